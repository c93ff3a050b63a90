"""Settings of a fine-tuning run, kept beside its results and checked when it resumes."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from equigemma._atomic_file import SUFFIX, replace_text


FIXED = (
    "model",
    "data",
    "data_sha256",
    "lora",
    "lora_kind",
    "quantize_base",
    "length",
    "batch_tokens",
    "validation_fraction",
    "seed",
)
"""What a run cannot change: its state, or its place in the data, would mean something else."""


# Everything that a run writes, and so all that goes where it leaves without a result.
_FILES = ("settings.json", "metrics.jsonl", "samples.jsonl", "curves.png")


def compare(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """What changes in a run that goes on with these settings; nothing is written.

    **Arguments:** `settings`: all that are known already.

    **Raises:** `ValueError` if the folder holds a run of which something that is fixed differs, or
    holds something else.
    """
    if not is_claimed(folder):
        if folder.is_dir() and not _is_ours(folder):
            raise ValueError(
                f"{folder} holds files that are no run's. Choose a new folder as --out."
            )
        return []
    before = _read(folder / "settings.json")
    changes = {
        name: f"{name} was {before.get(name)}, now it is {value}"
        for name, value in settings.items()
        if before.get(name) != value
    }
    if fixed := [changes[name] for name in FIXED if name in changes]:
        raise ValueError(
            f"{folder} holds another run: {'; '.join(fixed)}. Give the same again to go on "
            f"with it, or another --out."
        )
    return list(changes.values())


def is_claimed(folder: Path) -> bool:
    """Whether the folder holds a run that has trained: it has a checkpoint after a step."""
    steps = [path.name for path in folder.glob("checkpoints/*") if path.name.isdecimal()]
    return (folder / "settings.json").is_file() and any(map(int, steps))


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """A folder for a run, which is made if there is none. Within, a run that ends in an error
    before its first checkpoint leaves nothing behind.

    **Raises:** `OSError` if nothing can be written there.
    """
    from equigemma import train

    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        train.check_writable(folder)
        yield
    except BaseException:
        if not is_claimed(folder):
            clear(folder)
            for path in missing:
                with suppress(OSError):  # of somebody else's file in it
                    path.rmdir()
        raise


def clear(folder: Path) -> None:
    """Takes away what is left of a run that has not come to its first checkpoint."""
    if folder.is_dir() and _is_ours(folder):
        for name in _FILES:
            for path in (folder / name, folder / f"{name}{SUFFIX}"):
                path.unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def write(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of a run beside what comes of it."""
    replace_text(folder / "settings.json", json.dumps(settings, indent=2) + "\n")


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds nothing, or nothing but what a run writes."""
    names = {path.name for path in folder.iterdir()}
    known = {"checkpoints", *_FILES, *(f"{name}{SUFFIX}" for name in _FILES)}
    if not names or names == {f"settings.json{SUFFIX}"}:
        return True
    path = folder / "settings.json"
    return names <= known and path.is_file() and set(FIXED) <= _read(path).keys()


def sha256(path: Path) -> str:
    """Of the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not what a run writes there. Choose a new folder as --out.")
    return settings
