"""Runs every notebook of a folder from top to bottom; fails with the first cell that fails.

python tests/run_notebooks.py notebooks
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def main(folder: Path) -> None:
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        sys.exit(f"There are no notebooks in {folder}.")
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        try:
            NotebookClient(
                notebook, timeout=600, resources={"metadata": {"path": str(folder)}}
            ).execute()
        except CellExecutionError as error:
            sys.exit(f"{path} fails:\n{error}")
        cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        print(f"{path}: {cells} cells run")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
