"""Runs every notebook of a folder from top to bottom; fails with the first cell that fails.

python tests/run_notebooks.py notebooks
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def run(path: Path) -> str:
    """Runs one notebook in a kernel of its own; returns what is wrong with it, or nothing."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return f"{path} fails:\n{error}"
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    print(f"{path}: {cells} cells run", flush=True)
    return ""


def main(folder: Path) -> None:
    paths = sorted(folder.glob("*.ipynb"), reverse=True)
    if not paths:
        sys.exit(f"There are no notebooks in {folder}.")
    # Most of a notebook's time is compiling, on one core. The last ones do most, so they go first.
    with ThreadPoolExecutor(max_workers=2) as pool:
        failures = [failure for failure in pool.map(run, paths) if failure]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
