"""Metadata of a Hugging Face folder besides weights, config and vocabulary."""

from pathlib import Path
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._extras import Extras, nonempty_text, token_count
from equigemma.checkpoint.core._json import read_json


def folder_extras(folder: Path) -> Extras:
    """The extras of a folder in the layout of Hugging Face.

    **Raises:** `CheckpointError` if a file that is there is damaged.
    """
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
        context_length=token_count(inner.get("max_position_embeddings")),
        chat_template=nonempty_text(template),
        generation=_json(folder / "generation_config.json"),
    )


def _json(path: Path, otherwise: Any = None) -> Any:
    return read_json(path) if path.is_file() else otherwise
