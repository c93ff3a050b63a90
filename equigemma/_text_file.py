"""Files of text in UTF-8: one sentence about those that are something else."""

import os
from pathlib import Path


# What such files begin with, and what to do about them.
_KINDS = {
    b"\x1f\x8b": "compressed with gzip: unpack it first, with gunzip",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first, with bunzip2",
    b"\xfd7zXZ\0": "compressed with xz: unpack it first, with unxz",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard: unpack it first, with unzstd",
    b"PAR1": "a Parquet file: write its rows as JSON lines first, as pandas and datasets can",
    b"ARROW1": "an Arrow file: write its rows as JSON lines first, as pandas and datasets can",
    b"%PDF": "a PDF file: take the text out of it first",
    b"\xff\xfe": "text in UTF-16: convert it to UTF-8 first",
    b"\xfe\xff": "text in UTF-16: convert it to UTF-8 first",
}


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file of text, before it is decoded.

    **Raises:** `ValueError` for a folder, and for known files of other kinds; `OSError` if it
    cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name one of its files.")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file.")
    content = path.read_bytes()
    check_text(content, path)
    return content


def check_text(content: bytes, name: object) -> None:
    """Refuses what is known to be no text.

    **Raises:** `ValueError`.
    """
    for start, kind in _KINDS.items():
        if content.startswith(start):
            raise ValueError(f"{name} is {kind}.")
    if (at := content.find(0)) >= 0:
        raise ValueError(f"{name} is not text: byte {at} is zero (line {_line(content, at)}).")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file, without a byte-order mark, every line ended by a line feed.

    **Raises:** `ValueError` for what is not text in UTF-8, with the line; `OSError` if the file
    cannot be read.
    """
    content = read_bytes(path)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected text in UTF-8; byte {error.start} is not (line "
            f"{_line(content, error.start)}). Convert the file first."
        ) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _line(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1
