"""What a run was begun with, kept beside its results, so that none goes on as another."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


FIXED = (
    "model",
    "data",
    "data_sha256",
    "lora",
    "lora_kind",
    "eight_bit",
    "length",
    "batch_tokens",
    "held_out",
    "seed",
)
"""What a run cannot change: its state, or its place in the data, would mean something else."""


def claim(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Writes the settings into the folder of a run; what is new in a run that is begun again.

    **Raises:** `ValueError` if the folder holds a run of which something that is fixed differs, or
    holds something else.
    """
    path = folder / "settings.json"
    changes: list[str] = []
    if path.exists():
        before = _read(path)
        fixed = [
            f"{name} was {before.get(name)}, now it is {settings[name]}"
            for name in FIXED
            if before.get(name) != settings[name]
        ]
        if fixed:
            raise ValueError(
                f"{folder} holds another run: {'; '.join(fixed)}. Give the same again to go on "
                f"with it, or another --out."
            )
        changes = [
            f"{name} was {before.get(name)}, now it is {value}"
            for name, value in settings.items()
            if before.get(name) != value
        ]
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that are no run's. Choose a new folder as --out.")
    temporary = path.with_name("settings.json.new")
    temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return changes


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
