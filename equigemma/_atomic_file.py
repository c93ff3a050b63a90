"""Files that are replaced as a whole: written under another name and renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


SUFFIX = ".new"
"""Of the temporary name, which a process that is killed leaves behind and the next one reuses."""


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` if the block ends without an error.

    For small files of a single writer; `checkpoint.core` has one for many writers and power cuts.

    **Raises:** `OSError` if the file cannot be renamed.
    """
    temporary = path.with_name(f"{path.name}{SUFFIX}")
    yield temporary
    os.replace(temporary, path)


def replace_text(path: Path, text: str) -> None:
    """Replaces a file by one with this text, in UTF-8.

    **Raises:** `OSError` if it cannot be written.
    """
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
