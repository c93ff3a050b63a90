"""A `ModelConfig` as plain data and back, for folders that have no words of their own for it."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from beartype.door import is_bearable

from equigemma import config as _config
from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.config import ModelConfig


_KINDS = {
    name: kind
    for name, kind in vars(_config).items()
    if isinstance(kind, type) and is_dataclass(kind)
}


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Every field by its name. Layers that are alike are told once, and then by number."""
    distinct = list(dict.fromkeys(config.layers))
    data = _encode(config)
    data["layers"] = [distinct.index(layer) for layer in config.layers]
    return data | {"distinct_layers": [_encode(layer) for layer in distinct]}


def config_from_json(data: Mapping[str, Any]) -> ModelConfig:
    """The config that `config_to_json` wrote.

    **Raises:** `CheckpointError` for anything else.
    """
    try:
        rest = dict(data)
        distinct = [_decode(layer) for layer in rest.pop("distinct_layers")]
        config = _decode(rest | {"layers": []}, layers=[distinct[i] for i in rest["layers"]])
    except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the config that it keeps is damaged: {error}.") from error
    if not isinstance(config, ModelConfig):
        raise CheckpointError("the config that it keeps is damaged: it is not that of a model.")
    return config


def _encode(value: Any) -> Any:
    if not is_dataclass(value):
        return value
    named = {
        field.name: _encode(getattr(value, field.name))
        for field in fields(value)
        if not (isinstance(value, ModelConfig) and field.name == "layers")
    }
    return {"kind": type(value).__name__} | named


def _decode(data: Any, **given: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    kind = _KINDS[data["kind"]]
    values = {name: _decode(value) for name, value in data.items() if name != "kind"}
    values |= {name: tuple(value) for name, value in given.items()}
    hints = get_type_hints(kind)
    for name, value in values.items():
        # Whole numbers stand for themselves also where fractions may: JSON tells no difference.
        if not is_bearable(value, hints[name]) and not (
            type(value) is int and is_bearable(float(value), hints[name])
        ):
            raise TypeError(f"{name} is {value!r:.99}")
    return kind(**values)
