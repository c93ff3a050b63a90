"""KV cache of a whole model, and checks that it fits a model and the tokens of a call.

The rings of single layers are in `_cache.py`.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from wadler_lindig import AbstractDoc, TextDoc

from equigemma._arguments import as_float_dtype, as_integer
from equigemma._typing import Array, Bool, DTypeLike, Int, typed
from equigemma.config import ModelConfig
from equigemma.nn._cache import (
    AbstractKVCache,
    AbstractRing,
    Int8KVCache,
    KVCache,
    SharedKVCache,
    length_after,
)


class Cache(eqx.Module):
    """KV cache of a whole model: one entry per layer, and the number of tokens in each row.

    A layer that attends to the keys of another has None.

    A value: keep it to fork a conversation, donate it to update in place, compare it, or save it
    with `equinox.tree_serialise_leaves`.
    """

    layers: tuple[AbstractKVCache | None, ...]
    length: Int[Array, "*B"]

    def __pdoc__(self, **options: Any) -> AbstractDoc:
        return TextDoc(f"Cache({len(self.layers)} layers, length={eqx.tree_pformat(self.length)})")

    def __repr__(self) -> str:
        return f"Cache({len(self.layers)} layers, length={self.length!r})"


@typed
def init_cache(
    config: ModelConfig,
    batch_shape: SupportsIndex | Sequence[SupportsIndex] = (),
    *,
    capacity: SupportsIndex,
    dtype: DTypeLike = jnp.float32,
) -> Cache:
    """An empty cache for rows of up to `capacity` tokens; local layers get at most their window.

    **Arguments:**

    - `config`: of a causal model.
    - `batch_shape`: the shape of `*B`; a number is that of rows.
    - `capacity`: tokens per row, prompt and answer together.
    - `dtype`: of keys and values, usually the model's; int8 rounds each vector to 8 bits and a
      scale.

    **Returns:** a cache with `length` 0 in all rows.

    **Raises:** `ValueError` if `capacity < 1`, or for a bidirectional model; `TypeError` for a
    dtype that is neither of floats nor int8.
    """
    check_causal(config)
    capacity = as_integer("capacity", capacity)
    if capacity < 1:
        raise ValueError(
            f"A cache needs a capacity of at least one token, got capacity={capacity}."
        )
    sizes = batch_shape if isinstance(batch_shape, Sequence) else (batch_shape,)
    batch = tuple(as_integer("batch_shape", size, least=0) for size in sizes)
    dtype = as_float_dtype("dtype", dtype, or_=[jnp.int8])

    def layer(index: int) -> AbstractRing | None:
        if config.owner(index) != index:
            return None
        attention = config.layers[index].attention
        slots = min(capacity, attention.window or capacity)
        shape = (*batch, config.kv_heads(index), slots, attention.head_dim)
        if dtype == jnp.int8:
            ones = (*shape[:-1], 1)
            k, v = (jnp.zeros(shape, dtype) for _ in range(2))
            return Int8KVCache(k, v, *(jnp.zeros(ones, jnp.float32) for _ in range(2)))
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return Cache(tuple(map(layer, range(len(config.layers)))), jnp.zeros(batch, jnp.int32))


@typed
def capacity(config: ModelConfig, cache: Cache) -> int:
    """Capacity of `cache` in tokens per row: the slots of the layers that must hold the whole
    context.

    **Arguments:**

    - `config`: that of the model.
    - `cache`: as `init_cache` makes it.

    **Returns:** tokens per row; `sys.maxsize` where no layer limits them.
    """
    slots = [
        layer_cache.capacity
        for layer_cache, layer in zip(cache.layers, config.layers, strict=True)
        if isinstance(layer_cache, AbstractRing)
        and layer_cache.limits_sequence_length(layer.attention.window)
    ]
    return min(slots, default=sys.maxsize)


def check_causal(config: ModelConfig) -> None:
    """Refuses a KV cache for a bidirectional model.

    **Raises:** `ValueError`.
    """
    if any(layer.attention.mask_kind == "bidirectional" for layer in config.layers):
        raise ValueError(
            "This model is bidirectional (an encoder), tokens attend to later ones: it has no KV "
            "cache and generates no text. Call it without a cache."
        )


def share_kv(config: ModelConfig, cache: Cache | None) -> list[AbstractKVCache | None]:
    """The cache of every layer, as `SharedKVCache` where later layers attend to its keys."""
    layers = range(len(config.layers))
    lenders = {config.owner(index) for index in layers if config.owner(index) != index}
    own = (None for _ in layers) if cache is None else cache.layers
    return [SharedKVCache(one) if index in lenders else one for index, one in enumerate(own)]


def drop_shared_kv(
    layer_caches: Iterable[AbstractKVCache | None],
) -> tuple[AbstractKVCache | None, ...]:
    """The layer caches that are kept between calls: the inverse of `share_kv`."""
    return tuple(
        layer_cache.own if isinstance(layer_cache, SharedKVCache) else layer_cache
        for layer_cache in layer_caches
    )


def check_cache_matches(cache: Cache, config: ModelConfig, batch: tuple[int, ...]) -> None:
    """Refuses a cache of another model or batch.

    **Arguments:**

    - `cache`: what was given.
    - `config`: that of the model.
    - `batch`: the shape of `*B` of the tokens.

    **Raises:** `ValueError`.
    """
    if len(cache.layers) != len(config.layers):
        raise ValueError(
            f"`cache` is of a model with {len(cache.layers)} layers, this model has "
            f"{len(config.layers)}. Make it with init_cache(model.config, ...)."
        )
    if cache.length.shape != batch:
        raise ValueError(
            f"`cache` has a batch of shape {cache.length.shape}, `tokens` one of {batch}. Make it "
            f"with init_cache(model.config, {batch}, ...), or reshape the tokens."
        )
    for index, (layer, layer_config) in enumerate(zip(cache.layers, config.layers, strict=True)):
        if (layer is None) != (config.owner(index) != index):
            holds = "nothing" if layer is None else "keys"
            raise ValueError(
                f"`cache` is of another model: it holds {holds} for layer {index}, of which this "
                f"model has kv={layer_config.attention.kv}. Make it with "
                f"init_cache(model.config, ...)."
            )
        if not isinstance(layer, AbstractRing):
            continue
        head_dim = layer_config.attention.head_dim
        expected = (*batch, config.kv_heads(index), layer.capacity, head_dim)
        if layer.k.shape != expected:
            raise ValueError(
                f"`cache` is of another model: layer {index} has keys of shape {layer.k.shape}, "
                f"this model's are {expected}. Make it with init_cache(model.config, ...)."
            )


def check_capacity(cache: Cache, config: ModelConfig, positions: Int[Array, "*B L"]) -> None:
    """Refuses tokens at `positions` beyond the capacity of the cache, where lengths are known.

    **Raises:** `ValueError`.
    """
    total = length_after(cache.length, positions)
    room = capacity(config, cache)
    if not isinstance(total, Tracer) and (longest := int(total.max(initial=0))) > room:
        raise ValueError(
            f"`cache` has a capacity of {room} tokens, and these would make it {longest}. "
            f"Make it with init_cache(model.config, ..., capacity={longest}) or more."
        )


def continues(cache: Cache, positions: Int[Array, "*B L"]) -> Bool[Array, "*B"]:
    """True for rows whose tokens are one position after the other from the cache's length on."""
    is_token = positions >= 0
    number = jnp.cumsum(is_token, axis=-1, dtype=positions.dtype) - 1
    expected = jnp.where(is_token, cache.length[..., None] + number, -1)
    runs = is_token.astype(jnp.int32)
    starts = jnp.maximum(runs[..., 1:] - runs[..., :-1], 0).sum(axis=-1) + runs[..., 0]
    return (positions == expected).all(axis=-1) & (starts <= 1)


def check_continues(cache: Cache, positions: Int[Array, "*B L"]) -> None:
    """Refuses positions that do not continue the cache, where both are known.

    **Raises:** `ValueError`.
    """
    going_on = continues(cache, positions)
    if isinstance(going_on, Tracer) or np.all(going_on):
        return
    row = tuple(map(int, np.argwhere(~np.asarray(going_on))[0]))
    raise ValueError(
        f"`positions` must continue what `cache` holds, from {int(cache.length[row])} on one by "
        f"one, with padding (-1) before or after them; got {np.asarray(positions)[row].tolist()}"
        f"{f' in row {row}' if row else ''}. Leave them out where there is no padding."
    )


def masked_by_position(cache: Cache) -> bool:
    """Whether a mask has a column for each position, rather than for each key of the call."""
    return any(isinstance(layer, AbstractRing) for layer in cache.layers)
