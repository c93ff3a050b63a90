"""Intermediate values under DeepMind's names, `layer_0/attn/__call__`, as Linen would sow them.

Which of our modules a name belongs to is a table, like the one of the parameters; how a module is
watched is in `interpret.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from equigemma.interpret import Call, capture
from equigemma.linen._cache import layer_to_dict
from equigemma.nn import attention_weights


Wanted = Callable[["Site", str], bool]
"""Linen's filter: gets a site and the name of one of its methods."""

Intermediates = dict[str, Any]
"""Nested dicts like the parameters'; at the end a tuple with one value for each call."""


@dataclass(frozen=True)
class Site:
    """A place in DeepMind's model, as the filter of `capture_intermediates` sees it."""

    path: tuple[str, ...]
    module: eqx.Module | None
    """Our module at that place; None for the whole model."""

    @property
    def name(self) -> str | None:
        """The last part of the path."""
        return self.path[-1] if self.path else None


def _result(call: Call) -> Any:
    return call.result


def _with_cache(call: Call) -> Any:
    result, cache = call.result
    return None if cache is None else layer_to_dict(cache), result


def _parts_first(call: Call) -> Any:
    return jnp.moveaxis(call.result, -3, 0)


def _weights(call: Call) -> Any:
    # Recomputed from what went in, so that any way of computing attention can be watched.
    q, k, _, mask = call.args
    weights = attention_weights(q, k, mask, softcap=call.module.softcap)
    heads = weights.reshape(*weights.shape[:-4], -1, *weights.shape[-2:])
    return jnp.swapaxes(heads, -3, -2).astype(q.dtype)


@dataclass(frozen=True)
class _Place:
    """Where ours and theirs are the same; `value` is what theirs would have returned."""

    ours: str
    theirs: str
    value: Callable[[Call], Any] = _result
    methods: tuple[str, ...] = ("__call__",)


_PLACES = (
    _Place("embedding", "embedder", methods=("encode", "decode")),
    _Place("final_norm", "final_norm"),
    _Place("layers.{i}", "layer_{i}", _with_cache),
    _Place("layers.{i}.pre_attention_norm", "layer_{i}/pre_attention_norm"),
    _Place("layers.{i}.attention", "layer_{i}/attn", _with_cache),
    _Place("layers.{i}.attention.projection.q", "layer_{i}/attn/q_einsum"),
    _Place("layers.{i}.attention.projection.kv", "layer_{i}/attn/kv_einsum", _parts_first),
    _Place("layers.{i}.attention.projection.qkv", "layer_{i}/attn/qkv_einsum", _parts_first),
    _Place("layers.{i}.attention.query_norm", "layer_{i}/attn/_query_norm"),
    _Place("layers.{i}.attention.key_norm", "layer_{i}/attn/_key_norm"),
    _Place("layers.{i}.attention.attend", "layer_{i}/attn/attention_weights", _weights),
    _Place("layers.{i}.attention.output", "layer_{i}/attn/attn_vec_einsum"),
    _Place("layers.{i}.post_attention_norm", "layer_{i}/post_attention_norm"),
    _Place("layers.{i}.pre_ffw_norm", "layer_{i}/pre_ffw_norm"),
    # Gate and down projection have no scope of their own there.
    _Place("layers.{i}.ffw.gate", "layer_{i}/mlp"),
    _Place("layers.{i}.ffw.down", "layer_{i}/mlp"),
    _Place("layers.{i}.ffw", "layer_{i}/mlp"),
    _Place("layers.{i}.post_ffw_norm", "layer_{i}/post_ffw_norm"),
)


def watch(
    function: Callable[[Any], Any], model: eqx.Module, wanted: Wanted
) -> tuple[Any, Intermediates]:
    """`function(model)`, and what the wanted sites returned on the way."""
    targets = {
        (place.ours.format(i=index), method): (site, place.value)
        for place in _PLACES
        for index in _layers(place, model)
        if (site := _site(place, model, index)) is not None
        for method in place.methods
        if wanted(site, method)
    }
    result, calls = capture(function, model, {path for path, _ in targets})
    sown: Intermediates = {}
    for call in calls:
        if (call.path, call.method) in targets:
            site, value = targets[call.path, call.method]
            sow(sown, site, call.method, value(call))
    return result, sown


def sow(sown: Intermediates, site: Site, method: str, value: Any) -> None:
    """Adds one value to the nested dicts."""
    for name in site.path:
        sown = sown.setdefault(name, {})
    sown[method] = (*sown.get(method, ()), value)


def _layers(place: _Place, model: Any) -> range:
    return range(len(model.layers) if "{i}" in place.ours else 1)


def _site(place: _Place, model: Any, index: int) -> Site | None:
    """None where this model has no such module."""
    module: Any = model
    for name in place.ours.format(i=index).split("."):
        module = module[int(name)] if name.isdigit() else getattr(module, name, None)
    if module is None:
        return None
    return Site(tuple(place.theirs.format(i=index).split("/")), module)
