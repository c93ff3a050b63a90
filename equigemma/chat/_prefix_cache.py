"""Prefix caching: the KV cache of a conversation, reused for another that begins alike."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from equigemma.nn import AbstractKVCache, AbstractRing, Cache, Transformer, init_cache


class PrefixCache(NamedTuple):
    """A KV cache and the ids that went into it, for conversations with the same model.

    In the place of each soft token stands what says which image it is of.

    A ring holds the newest keys only: what it held before is gone. But an answer may be spelled
    otherwise once it is history, so that the way back into the last turn must stay open: the rings
    as they were when that turn began are kept too.
    """

    model: Transformer
    capacity: int
    ids: tuple[int | bytes, ...]
    cache: Cache
    turn_start: int
    rings: tuple[Any, ...]
    """One entry per layer; None for one that has lost nothing since."""


def restore_prefix(
    prefix: PrefixCache | None, model: Transformer, capacity: int, ids: Sequence[int | bytes]
) -> tuple[Cache, int]:
    """A cache that has read the beginning of `ids`, and how many of them.

    The last id is left to be read in any case: an answer comes out of reading something.
    """
    serves = prefix is not None and prefix.model is model and prefix.capacity == capacity
    if prefix is None or not serves or not _is_alive(prefix.cache):
        return _empty(model, capacity), 0
    common = _common(prefix.ids, ids[:-1])
    if common == len(prefix.ids) or all(older is None for older in prefix.rings):
        # Keys of later positions stay where they are: nothing looks beyond a cache's length.
        return Cache(prefix.cache.layers, jnp.asarray(common, jnp.int32)), common
    if common < prefix.turn_start:
        return _empty(model, capacity), 0
    layers = tuple(
        newest if older is None else older
        for newest, older in zip(prefix.cache.layers, prefix.rings, strict=True)
    )
    return Cache(layers, jnp.asarray(prefix.turn_start, jnp.int32)), prefix.turn_start


def snapshot(
    model: Transformer, capacity: int, ids: Sequence[int | bytes], cache: Cache, before: Cache
) -> PrefixCache | None:
    """The prefix cache after a turn; None if the KV cache was given up on the way.

    **Arguments:** `ids`: of the conversation, of which `cache` has read the beginning. `before`:
    the cache that the turn began with.
    """
    if not _is_alive(cache):
        return None
    seen = int(cache.length)
    rings = tuple(
        None if layer is None or _has_all(layer, entry.attention.window, seen) else layer
        for layer, entry in zip(before.layers, model.config.layers, strict=True)
    )
    return PrefixCache(model, capacity, tuple(ids[:seen]), cache, int(before.length), rings)


def _is_alive(cache: Cache) -> bool:
    """Whether the arrays are: a step of a generation takes those of the step before it."""
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


def _has_all(layer: AbstractKVCache, window: int | None, seen: int) -> bool:
    """Whether a layer has the keys of all `seen` tokens still."""
    return isinstance(layer, AbstractRing) and (
        layer.limits_sequence_length(window) or seen <= layer.capacity
    )


def _common(ours: Sequence[int | bytes], theirs: Sequence[int | bytes]) -> int:
    for index, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            return index
    return min(len(ours), len(theirs))


def _empty(model: Transformer, capacity: int) -> Cache:
    return init_cache(model.config, (), capacity=capacity, dtype=model.dtype)
