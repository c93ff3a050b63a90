"""The layers of a model and those of its config: that they agree, and how to choose among both.

What a layer is depends on its config in two places. The layer computes with its own part of it; the
model takes from its config what it does for all layers, such as rotations and caches.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeGuard, TypeVar

import equinox as eqx
import jax

from equigemma.config import AttentionConfig, ModelConfig
from equigemma.nn._attention import Attention
from equigemma.nn._shared_kv import SharedKVAttention
from equigemma.nn._stack import Stacked


_Node = TypeVar("_Node", bound=eqx.Module)


def check_layers(layers: Sequence[Any] | Stacked, config: ModelConfig) -> None:
    """Refuses layers that are not those of the config. Nothing of an array is looked at.

    **Arguments:**

    - `layers`: of a model.
    - `config`: its config.

    **Raises:** `ValueError`.
    """
    for index, layer, expected in _pairs(layers, config):
        found = _attention_config(layer)
        # One's own attention has no such config, and nothing to compare.
        if found is not None and found != expected:
            name = next(f.name for f in fields(found) if _differ(found, expected, f.name))
            raise ValueError(
                f"Layer {index} has {name}={getattr(found, name)}, and model.config.layers[{index}]"
                f" says {getattr(expected, name)}. {_BOTH}"
            )


_BOTH = (
    "Move, drop or repeat layers with model.with_layers([...]), which changes the model and its "
    "config."
)


def _differ(one: object, other: object, name: str) -> bool:
    return getattr(one, name) != getattr(other, name)


def _pairs(
    layers: Sequence[Any] | Stacked, config: ModelConfig
) -> list[tuple[int, Any, AttentionConfig]]:
    """Index, layer and config of every layer; of stacked ones every layer for its repeats."""
    count = len(config.layers)
    if isinstance(layers, Stacked):
        repeats = len(jax.tree.leaves(layers.period)[0])
        layers = (*layers.period * repeats, *layers.rest)
    if len(layers) != count:
        raise ValueError(f"The model has {len(layers)} layers, and its config {count}. {_BOTH}")
    attention = (layer.attention for layer in config.layers)
    return list(zip(range(count), layers, attention, strict=True))


def _attention_config(layer: Any) -> AttentionConfig | None:
    """That of the attention within a layer, or within what is around one."""
    own = getattr(layer, "attention", None)
    if _is_attention(own):
        return own.config
    for part in jax.tree.leaves(layer, is_leaf=_is_attention):
        if _is_attention(part):
            return part.config
    return None


def _is_attention(node: Any) -> TypeGuard[Attention | SharedKVAttention]:
    return isinstance(node, Attention | SharedKVAttention)


def with_attention_config(layer: Any, config: AttentionConfig) -> Any:
    """The same layer, whose attention has another config."""

    def changed(part: Any) -> Any:
        return replaced(part, config=config) if _is_attention(part) else part

    return jax.tree.map(changed, layer, is_leaf=_is_attention)


def replaced(module: _Node, **changes: Any) -> _Node:
    """The module with other values of some fields, static ones too, without its `__init__`."""
    new = object.__new__(type(module))
    for field in fields(module):
        value = changes.get(field.name, getattr(module, field.name))
        object.__setattr__(new, field.name, value)
    return new
