"""Untrusted JSON files."""

import json
from pathlib import Path
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    **Raises:** `CheckpointError` if there is no such file, or if it holds anything else.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object.")
    return value


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Writes a file, keys in their order; `indent=None` is for long lists."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
