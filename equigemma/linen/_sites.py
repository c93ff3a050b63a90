"""Intermediate values under DeepMind's names, `layer_0/attn/__call__`, as Linen would sow them.

Where a module is follows from where its weight is; what they return in another form is brought into
DeepMind's here. How a module is watched is in `interpret.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp

from equigemma import nn
from equigemma.checkpoint._linen import names
from equigemma.config import AltUp
from equigemma.interpret import Call, capture
from equigemma.linen._cache import layer_to_dict


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


def _with_cache_and_streams(call: Call) -> Any:
    cache, streams = _with_cache(call)
    return cache, list(streams)


def _parts_first(call: Call) -> Any:
    return jnp.moveaxis(call.result, -3, 0)


def _weights(call: Call) -> Any:
    # Recomputed from what went in, so that any way of computing attention can be watched.
    q, k, _, sight = call.args
    weights = nn.attention_weights(q, k, sight.mask(), softcap=call.module.softcap)
    heads = weights.reshape(*weights.shape[:-4], -1, *weights.shape[-2:])
    return jnp.swapaxes(heads, -3, -2).astype(q.dtype)


def watch(
    function: Callable[[Any], Any], model: nn.Transformer, wanted: Wanted
) -> tuple[Any, Intermediates]:
    """`function(model)`, and what the wanted sites returned on the way."""
    targets = {
        (path, method): (site, value)
        for path, theirs, value, methods in _places(model)
        if (site := Site(tuple(theirs.split("/")), _module_at(model, path))).module is not None
        for method in methods
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


class _Place(NamedTuple):
    """Where ours and theirs are the same; `value` is what theirs would have returned."""

    ours: str
    theirs: str
    value: Callable[[Call], Any] = _result
    methods: tuple[str, ...] = ("__call__",)


def _places(model: nn.Transformer) -> Iterator[_Place]:
    """A module that holds one weight is where the weight is; larger modules are named here."""
    for path, key in names(model).items():
        place, theirs = path.rpartition(".")[0], key.rpartition("/")[0]
        name = place.rpartition(".")[2]
        if place.startswith("vision."):
            continue  # The tower is watched from outside only.
        if place == "embedding":
            yield _Place(place, theirs, methods=("encode", "decode"))
        elif name in ("kv", "qkv"):
            yield _Place(place, theirs, _parts_first)
        elif name.endswith("norm") or isinstance(_module_at(model, place), nn.AbstractEinsum):
            yield _Place(place, theirs)
    parallel = isinstance(model.config.stream, AltUp)
    for index in range(len(model.layers)):
        ours, theirs = f"layers.{index}", f"layer_{index}"
        yield _Place(ours, theirs, _with_cache_and_streams if parallel else _with_cache)
        yield _Place(f"{ours}.attention", f"{theirs}/attn", _with_cache)
        yield _Place(f"{ours}.attention.attend", f"{theirs}/attn/attention_weights", _weights)
        if isinstance(_module_at(model, f"{ours}.ffw"), nn.GatedFeedForward):
            yield _Place(f"{ours}.ffw", f"{theirs}/mlp")


def _module_at(model: Any, path: str) -> Any:
    """None where this model has no such module."""
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name, None)
    return model
