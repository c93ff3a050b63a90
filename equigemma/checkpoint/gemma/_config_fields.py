"""DeepMind's `TransformerConfig` as ours: what a config is of, and its fields by name.

Configs come as objects of any version of their package or as mappings of their fields; enumerations
count by name. A field that we do not know is refused, because it may change what is computed. What
the fields mean is in `_config.py`.
"""

import enum
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from equigemma.checkpoint.gemma._config import GENERATIONS
from equigemma.checkpoint.gemma._config_vision import with_vision
from equigemma.config import ModelConfig


def config_from_upstream(config: Any, *, text_only: bool = True) -> ModelConfig:
    """The model that `config` describes, with its vision encoder unless `text_only`.

    **Raises:** `ValueError` that names every field which is unknown or missing, or the value that
    is not supported; `TypeError` if `config` is neither a mapping nor a dataclass.
    """
    given = _fields(config)
    for generation in GENERATIONS:
        if set(given) <= generation.known:
            missing = sorted(generation.required - set(given))
            if missing:
                raise ValueError(f"A config of {generation.name} needs also {', '.join(missing)}.")
            model = generation.build({**generation.optional, **given})
            return model if text_only else with_vision(model, given.get("vision_encoder"))
    nearest = min(GENERATIONS, key=lambda generation: len(set(given) - generation.known))
    unknown = sorted(set(given) - nearest.known)
    raise ValueError(
        f"This config is not of a generation that can be converted "
        f"({', '.join(generation.name for generation in GENERATIONS)}): it has also "
        f"{', '.join(unknown)}."
    )


def _fields(config: Any) -> dict[str, Any]:
    if is_dataclass(config) and not isinstance(config, type):
        config = {field.name: getattr(config, field.name) for field in fields(config)}
    if not isinstance(config, Mapping):
        raise TypeError(
            "from_upstream needs a TransformerConfig of DeepMind's package or a mapping of its "
            f"fields, got a {type(config).__name__}."
        )
    return {name: _by_name(value) for name, value in config.items()}


def _by_name(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return tuple(_by_name(entry) for entry in value)
    return value
