"""Intermediate values under DeepMind's names, `layer_0/attn/__call__`, as Linen would sow them.

Which modules of ours are theirs is in `_places.py` and `_places_vision.py`, what they return in
DeepMind's form in `_values.py`, how a module is watched in `interpret`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx

from equigemma import nn
from equigemma.interpret import Call, capture
from equigemma.linen._place import Place, module_at
from equigemma.linen._places import places


Wanted = Callable[["Site", str], bool]
"""Linen's filter: gets a site and the name of one of its methods."""

Intermediates = dict[str, Any]
"""Nested dicts like the parameters'; at the end a tuple with one value for each call."""


@dataclass(frozen=True)
class Site:
    """A module of DeepMind's model, as the filter of `capture_intermediates` sees it."""

    path: tuple[str, ...]
    """Where its values are: the names of modules from the outside in."""
    module: eqx.Module | None
    """Our module at that place; None for the whole model."""
    name: str | None
    """The module's own name. It is the last part of the path, or that of a module which shares the
    scope of another: the projections of a feed-forward are `Einsum_0` and `Einsum_1` of `mlp`.
    """


WHOLE = Site((), None, None)
"""The whole model."""


def watch(
    function: Callable[[Any], Any], model: nn.Transformer, wanted: Wanted
) -> tuple[Any, Intermediates]:
    """`function(model)`, and what the wanted sites returned on the way."""
    targets: dict[tuple[str, str], list[tuple[Site, Place]]] = {}
    for place in places(model):
        module = module_at(model, place.source)
        site = Site(tuple(place.scope.split("/")), module, place.name)
        if wanted(site, place.method):
            key = place.source, place.source_method
            targets.setdefault(key, []).append((site, place))
    chosen = [place for found in targets.values() for _, place in found]
    sources = {place.source for place in chosen} | {
        place.inner for place in chosen if place.inner is not None
    }
    result, calls = capture(function, model, sources)
    sown: Intermediates = {}
    latest: dict[str | None, Call] = {}
    for call in calls:
        latest[call.path] = call
        for site, place in targets.get((call.path, call.method), ()):
            sow(sown, site, place.method, place.value(call, latest.get(place.inner)))
    return result, sown


def sow(sown: Intermediates, site: Site, method: str, value: Any) -> None:
    """Adds one value to the nested dicts."""
    for name in site.path:
        sown = sown.setdefault(name, {})
    sown[method] = (*sown.get(method, ()), value)
