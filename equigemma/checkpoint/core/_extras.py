"""Metadata of a checkpoint besides weights, config and vocabulary; `convert` carries it along."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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


def token_count(value: Any) -> int | None:
    """A number of tokens as files state it, or None if it is none."""
    return value if type(value) is int and 0 < value < 2**31 else None


def nonempty_text(value: Any) -> str | None:
    """The text, or None if there is none."""
    return value if isinstance(value, str) and value else None
