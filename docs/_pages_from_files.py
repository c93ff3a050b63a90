"""MkDocs hooks: pages and pictures of the site that are files elsewhere in the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the changelog, the results of the benchmarks, and their plots."""
    # Its links start from the root of the repository.
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changelog))
    results = RESULTS.read_text(encoding="utf-8")
    files.append(File.generated(config, "results.md", content=results))
    for name in ("speed.png", "memory.png"):
        path = str(RESULTS.parent / name)
        files.append(File.generated(config, name, abs_src_path=path))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the tables of a section of the results where a page says `<!-- results: HEADING -->`."""
    return re.sub(r"<!-- results: (.+?) -->", lambda match: tables(match[1]), markdown)


def tables(heading: str) -> str:
    """The section of the results below a heading, as far as its last table.

    **Raises:** `ValueError` if there is no such section, or no table in it.
    """
    _, found, rest = RESULTS.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    section = rest.partition("\n## ")[0]
    rows = [match.end() for match in re.finditer(r"^\|.*\|$", section, re.M)]
    if not found or not rows:
        raise ValueError(f"{RESULTS.name} has no tables below {heading!r}.")
    return section[: rows[-1]].strip()
