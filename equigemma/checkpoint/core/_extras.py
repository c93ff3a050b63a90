"""What a checkpoint says besides weights, config and vocabulary, to be carried along."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError, about
from equigemma.checkpoint.core._json import read_json
from equigemma.checkpoint.gguf._container import GGUFFile


_NOT_NOTES = ("general.architecture", "general.name", "general.type")


@dataclass(frozen=True)
class Extras:
    """None: the checkpoint does not say."""

    context_length: int | None = None
    """Tokens that the model was trained to see."""
    chat_template: str | None = None
    name: str | None = None
    generation: Mapping[str, Any] | None = None
    """What `generation_config.json` holds."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Of a GGUF file: what it says about where the model is from, such as its licence."""


def read_extras(origin: Path) -> Extras:
    """The extras of a GGUF file, or of a folder in the layout of Hugging Face.

    **Raises:** `CheckpointError` if a file that is there is damaged.
    """
    with about(origin):
        return _of_gguf(GGUFFile.open(origin)) if origin.is_file() else _of_folder(origin)


def _of_gguf(file: GGUFFile) -> Extras:
    architecture = file.metadata.get("general.architecture")
    return Extras(
        context_length=_whole(file.metadata.get(f"{architecture}.context_length")),
        chat_template=_text(file.metadata.get("tokenizer.chat_template")),
        name=_text(file.metadata.get("general.name")),
        notes={
            key: value
            for key, value in file.metadata.items()
            if key.startswith("general.") and key not in _NOT_NOTES and _is_note(value)
        },
    )


def _of_folder(folder: Path) -> Extras:
    config = _json(folder / "config.json") or {}
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    template = _json(folder / "tokenizer_config.json", {}).get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if template is None:
        # That of a processor, for images too, before there was a file in Jinja.
        template = _json(folder / "chat_template.json", {}).get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError("its chat_template.jinja is not UTF-8.") from error
    return Extras(
        context_length=_whole(inner.get("max_position_embeddings")),
        chat_template=_text(template),
        generation=_json(folder / "generation_config.json"),
    )


def _json(path: Path, otherwise: Any = None) -> Any:
    return read_json(path) if path.is_file() else otherwise


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 2**31 else None


def _is_note(value: Any) -> bool:
    """Whether a value is text: numbers are about the file, such as how it was packed."""
    return bool(value) and (
        isinstance(value, str)
        or isinstance(value, list)
        and all(isinstance(entry, str) for entry in value)
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
