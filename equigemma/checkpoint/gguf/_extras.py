"""Metadata of a GGUF file besides weights, config and vocabulary."""

from pathlib import Path
from typing import Any

from equigemma.checkpoint.core._extras import Extras, nonempty_text, token_count
from equigemma.checkpoint.gguf._container import GGUFFile


_NOT_NOTES = ("general.architecture", "general.name", "general.type")


def gguf_extras(path: Path) -> Extras:
    """The extras of a GGUF file.

    **Raises:** `CheckpointError` if it is damaged.
    """
    file = GGUFFile.open(path)
    architecture = file.metadata.get("general.architecture")
    return Extras(
        context_length=token_count(file.metadata.get(f"{architecture}.context_length")),
        chat_template=nonempty_text(file.metadata.get("tokenizer.chat_template")),
        name=nonempty_text(file.metadata.get("general.name")),
        notes={
            key: value
            for key, value in file.metadata.items()
            if key.startswith("general.") and key not in _NOT_NOTES and _is_note(value)
        },
    )


def _is_note(value: Any) -> bool:
    """Whether a value is text: numbers are about the file, such as how it was packed."""
    return bool(value) and (
        isinstance(value, str)
        or isinstance(value, list)
        and all(isinstance(entry, str) for entry in value)
    )
