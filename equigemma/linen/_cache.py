"""The cache in DeepMind's layout: every layer as long as the text, with its slots' positions.

Their sampler slices it along batch and length and sets `end_index` itself, so outside it stays a
dict of dicts; inside, one `SlottedCache` per layer speaks for it. The ring caches that our own
sampling uses are in `nn/_cache.py`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from equigemma._kernels import update_slot
from equigemma._typing import Array, Float, Int, typed
from equigemma.config import ModelConfig
from equigemma.nn import AbstractKVCache, Cache, KeysValues, SharedKVCache


CacheDict = dict[str, dict[str, Array]]
"""For each `layer_i`: `k` and `v` `[*B S K H]`, `positions` `[*B S]`, `end_index` `[*B]`."""


class SlottedCache(AbstractKVCache):
    """Keys and values in the order they came, whatever their positions.

    All rows write into the same slots, those after the first row's `end_index`. Which slots a query
    attends to is for the caller's mask to say, except for the window, which goes by `positions`.

    **Source:** gemma `gm/nn/_modules.py::Attention`.
    """

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    positions: Int[Array, "B S"]
    end_index: Int[Array, " B"]

    def update(
        self, new: KeysValues, length: Int[Array, " B"], window: int | None
    ) -> tuple[KeysValues, "SlottedCache"]:
        """Writes `new` into the next slots; `end_index` counts what was written, not the slots."""
        del length, window
        start = self.end_index[0] % self.positions.shape[1]
        write = _write_one if new.k.shape[-2] == 1 else _write_chunk
        written = SlottedCache(
            write(self.k, jnp.swapaxes(new.k, 1, 2), start),
            write(self.v, jnp.swapaxes(new.v, 1, 2), start),
            write(self.positions, new.positions, start),
            self.end_index + new.k.shape[-2],
        )
        keys = KeysValues(
            jnp.swapaxes(written.k, 1, 2), jnp.swapaxes(written.v, 1, 2), written.positions
        )
        return keys, written


def _write_chunk(slots: Array, new: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis=1)


def _write_one(slots: Array, new: Array, slot: Array) -> Array:
    return update_slot(slots, new, slot, axis=1)


def from_dict(config: ModelConfig, layers: Mapping[str, Mapping[str, Array]]) -> Cache:
    """Their dict as a cache of ours, with one batch axis. Nothing is copied."""
    caches = tuple(
        SlottedCache(**layers[f"layer_{index}"]) if config.owner(index) == index else None
        for index in range(len(layers))
    )
    # Slots carry their own positions here, so the count of tokens seen is not read.
    return Cache(caches, jnp.zeros_like(layers["layer_0"]["end_index"]))


def to_dict(config: ModelConfig, cache: Cache) -> CacheDict:
    """The inverse of `from_dict`. A layer that shares keys holds what their owner holds."""
    layers = {index: layer_to_dict(layer) for index, layer in enumerate(cache.layers)}
    return {
        f"layer_{index}": held
        for index in layers
        if (held := layers[config.owner(index)]) is not None
    }


def layer_to_dict(layer: Any) -> dict[str, Array] | None:
    """One layer of it; None if it has no cache."""
    if isinstance(layer, SharedKVCache):
        layer = layer.own
    if layer is None:
        return None
    return {
        "end_index": layer.end_index,
        "k": layer.k,
        "positions": layer.positions,
        "v": layer.v,
    }


@typed
def init_cache(
    config: ModelConfig,
    *,
    batch_size: int,
    dtype: Any = jnp.bfloat16,
    cache_length: int,
    sharding: Any = None,
) -> CacheDict:
    """An empty cache of `cache_length` slots in every layer.

    **Arguments:** `dtype`: of keys and values; anything that names a dtype. `sharding`: where the
    arrays live. None leaves it to JAX, one `jax.sharding.Sharding` holds for all arrays, and a tree
    with the same beginning as the cache (`{"layer_0": ..., ...}`) for each part; a function in the
    tree gets its part as `jax.ShapeDtypeStruct`s and returns what to put there.

    **Raises:** `ValueError` if `batch_size` or `cache_length` is below 1.
    """
    for name, size in (("batch_size", batch_size), ("cache_length", cache_length)):
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}.")
    empty = partial(_empty, config, batch_size, jnp.dtype(dtype), cache_length)
    placed = _resolve(sharding, jax.eval_shape(empty))
    leaves, structure = jax.tree.flatten(placed, is_leaf=lambda leaf: leaf is None)
    return _empty_at(config, batch_size, jnp.dtype(dtype), cache_length, tuple(leaves), structure)


def _empty(config: ModelConfig, batch_size: int, dtype: jnp.dtype, cache_length: int) -> CacheDict:
    def layer(index: int) -> dict[str, Array]:
        head_dim = config.layers[index].attention.head_dim
        shape = (batch_size, cache_length, config.kv_heads(index), head_dim)
        return {
            "end_index": jnp.zeros(batch_size, jnp.int32),
            "k": jnp.zeros(shape, dtype),
            "positions": jnp.zeros((batch_size, cache_length), jnp.int32),
            "v": jnp.zeros(shape, dtype),
        }

    return {f"layer_{index}": layer(index) for index in range(len(config.layers))}


@partial(jax.jit, static_argnums=range(6))
def _empty_at(
    config: ModelConfig,
    batch_size: int,
    dtype: jnp.dtype,
    cache_length: int,
    shardings: tuple,
    structure: Any,
) -> CacheDict:
    cache = _empty(config, batch_size, dtype, cache_length)
    placements = jax.tree.unflatten(structure, shardings)
    return jax.tree.map(
        lambda sharding, part: (
            part if sharding is None else jax.lax.with_sharding_constraint(part, sharding)
        ),
        placements,
        cache,
        is_leaf=lambda leaf: leaf is None,
    )


def _resolve(sharding: Any, struct: Any) -> Any:
    """The tree of shardings with the functions in it replaced by what they return."""

    def one(entry: Any, part: Any) -> Any:
        if entry is None or isinstance(entry, jax.sharding.Sharding):
            return entry
        if callable(entry):
            return _resolve(entry(part), part)
        raise TypeError(
            "`sharding` must be None, a jax.sharding.Sharding, a function, or a tree of them with "
            f"the cache's structure; got a {type(entry).__name__} in it."
        )

    return jax.tree.map(one, sharding, struct, is_leaf=lambda leaf: leaf is None)
