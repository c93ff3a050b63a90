"""Attention in blocks of queries: keys that no query of a block attends to are left out.

How queries and keys mix is given; what is decided here, from static shapes, is which of them meet.
The result is that of one whole mask, for every token at a real position: each block still masks the
keys that it gets, so that a block may get too many, never too few.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from equigemma._typing import Array, Bool, Float, Int, Shaped


Mix = Callable[[Array, Array, Array, Array], Array]
"""Queries `[*B L N H]`, keys and values `[*B K S H]`, mask `[*B L S]` to outputs `[*B L N H]`."""

BLOCK = 128
"""Queries of a block, at least: smaller products waste the processor."""

UNROLLED = 8
"""Blocks that are written out one by one; more of them are a loop."""

LARGEST = 1 << 25
"""Logits that are there at once, at most: 128 MB of float32."""


Part = tuple[int | Array, int]
"""A run along an axis: where it starts, perhaps known at run time only, and how long it is."""


def cut(x: Shaped[Array, "..."], part: Part | None, axis: int) -> Shaped[Array, "..."]:
    """A run of `x` along one axis; all of it for None."""
    if part is None:
        return x
    start, size = part
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


class MaskSpec(Protocol):
    """An attention mask `[*B L S]` that is not materialised yet."""

    @property
    def q_pos(self) -> Int[Array, "*B L"]:
        """Positions of the queries; −1 is padding."""
        ...

    @property
    def k_pos(self) -> Int[Array, "*B S"]:
        """Positions of the keys; −1 marks an empty slot."""
        ...

    @property
    def window(self) -> int | None:
        """Sliding window: the largest number of keys that a query attends to; None: all."""
        ...

    @property
    def mask_kind(self) -> Literal["causal", "causal_bidirectional_images", "bidirectional"]:
        """Which keys are attended to besides those before a query."""
        ...

    @property
    def explicit_mask(self) -> Bool[Array, "*B L S"] | None:
        """A mask in place of the causal rule."""
        ...

    @property
    def block_end(self) -> Int[Array, "*B L"] | None:
        """The position where the block ends whose keys a query sees, ahead of it too."""
        ...

    @property
    def key_layout(self) -> Literal["aligned", "by_position"] | None:
        """`"aligned"`: the last keys are those of the queries, one by one. `"by_position"`: slot p
        holds position p. None: not known.
        """
        ...

    def mask(self) -> Bool[Array, "*B L S"]:
        """All of it."""
        ...

    def part(self, queries: Part | None = None, keys: Part | None = None) -> "MaskSpec":
        """That of a run of queries and one of keys. None: all of them."""
        ...


def blockwise_attention(
    mix: Mix,
    q: Float[Array, "*B L N H"],
    k: Float[Array, "*B K S H"],
    v: Float[Array, "*B K S H"],
    mask_spec: MaskSpec,
) -> Float[Array, "*B L N H"]:
    """`mix(q, k, v, mask_spec.mask())`, at the cost of the keys that can be attended to.

    Where slots of keys are those of the queries (`MaskSpec.key_layout`), a local layer takes L
    times its window and a global one half of the square. A memory in order of positions is read as
    far as it is filled. Under a mask that is given, one query reads from the first key that it
    attends to to the last. Of keys in an order that is not known all are read.

    **Source:** Beltagy et al. 2020, arXiv:2004.05150, the band.
    """
    length = q.shape[-3]
    if length > 1 and mask_spec.explicit_mask is None and mask_spec.mask_kind != "bidirectional":
        if mask_spec.key_layout == "by_position":
            return _filled(mix, q, k, v, mask_spec)
        if mask_spec.key_layout == "aligned" and mask_spec.block_end is None:
            return _recent(mix, q, k, v, mask_spec)
    if length == 1 and mask_spec.explicit_mask is not None:
        return _seen(mix, q, k, v, mask_spec)
    return _in_turn(mix, q, k, v, mask_spec)


def _filled(mix: Mix, q: Array, k: Array, v: Array, mask_spec: MaskSpec) -> Array:
    """Slot p holds position p: slots after those of the furthest query are not read."""
    furthest = mask_spec.q_pos if mask_spec.block_end is None else mask_spec.block_end

    def read(size: int) -> Array:
        keys = (0, size)
        return _in_turn(mix, q, cut(k, keys, -2), cut(v, keys, -2), mask_spec.part(keys=keys))

    return _at_least(furthest.max() + 1, _parts(k.shape[-2]), read)


def _seen(mix: Mix, q: Array, k: Array, v: Array, mask_spec: MaskSpec) -> Array:
    """The attended keys are found in the mask. A query that attends to none is given all."""
    slots, window = k.shape[-2], mask_spec.window
    sizes = _parts(slots) if window is None else [*range(window, slots, window)][:2] + [slots]
    mask = mask_spec.mask()
    seen = mask.any(axis=tuple(range(mask.ndim - 1)))
    first, behind = jnp.argmax(seen), jnp.argmax(seen[::-1])
    needed = jnp.where(mask.any(axis=-1).all(), slots - behind - first, slots)

    def read(size: int) -> Array:
        keys = (jnp.minimum(first, slots - size), size)
        return mix(q, cut(k, keys, -2), cut(v, keys, -2), cut(mask, keys, -1))

    return _at_least(needed, sizes, read)


def _parts(slots: int) -> list[int]:
    """How many of so many slots it is worth while to read without the others."""
    sizes = sorted({-(-slots // parts) for parts in (8, 4, 2, 1)})
    return [size for size in sizes if size >= BLOCK or size == slots]


def _at_least(needed: Array, sizes: list[int], read: Callable[[int], Array]) -> Array:
    """`read` of the smallest size that is enough."""
    if len(sizes) == 1:
        return read(sizes[0])
    chosen = sum(jnp.asarray(needed > size, jnp.int32) for size in sizes[:-1])
    return jax.lax.switch(chosen, [partial(read, size) for size in sizes])


def _recent(mix: Mix, q: Array, k: Array, v: Array, mask_spec: MaskSpec) -> Array:
    """The last slots are those of the queries; before them is what is remembered, if anything."""
    old = k.shape[-2] - q.shape[-3]
    whole = partial(_band, mix, q, k, v, mask_spec)
    if not old:
        return whole()
    new = (old, q.shape[-3])
    return jax.lax.cond(
        (mask_spec.k_pos[..., :old] >= 0).any(),
        whole,
        lambda: _band(mix, q, cut(k, new, -2), cut(v, new, -2), mask_spec.part(keys=new)),
    )


def _band(mix: Mix, q: Array, k: Array, v: Array, mask_spec: MaskSpec) -> Array:
    length, slots = q.shape[-3], k.shape[-2]
    old, window = slots - length, mask_spec.window
    if window is None:
        size = max(BLOCK, -(-length // UNROLLED))
    else:
        size = BLOCK if length <= UNROLLED * BLOCK else max(BLOCK, window // 4)

    def block(start: Any, rows: int, first: Any, width: int) -> Array:
        keys, queries = (first, width), (start, rows)
        part = mask_spec.part(queries, keys)
        return _in_turn(mix, cut(q, queries, -3), cut(k, keys, -2), cut(v, keys, -2), part)

    def written_out(start: int) -> Array:
        end = min(start + size, length)
        first = 0 if window is None else max(0, old + start - window)
        return block(start, end - start, first, old + end - first)

    if length <= UNROLLED * size:
        blocks = [written_out(start) for start in range(0, length, size)]
        return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=-3)
    assert window is not None
    width = min(slots, size + window)

    def one(start: Array) -> Array:
        first = jnp.clip(old + start + size - width, 0, slots - width)
        return block(start, size, first, width)

    return _looped(one, length, size, written_out)


def _in_turn(mix: Mix, q: Array, k: Array, v: Array, mask_spec: MaskSpec) -> Array:
    """All queries attend to all keys: at once, or one block after the other if that is too much."""
    *batch, length, heads, _ = q.shape
    row = prod(batch) * heads * k.shape[-2]
    if length * row <= LARGEST or length == 1:
        return mix(q, k, v, mask_spec.mask())
    size = max(1, LARGEST // 4 // row)

    def rows(start: Any, size: int) -> Array:
        return mix(cut(q, (start, size), -3), k, v, mask_spec.part((start, size)).mask())

    return _looped(partial(rows, size=size), length, size, lambda at: rows(at, length - at))


def _looped(
    one: Callable[[Array], Array], length: int, size: int, rest: Callable[[int], Array]
) -> Array:
    """Blocks of `size` queries one after the other, then the rest. A backward pass computes the
    logits of each again: kept for all of them they would be what a block is to avoid.
    """
    count = length // size
    blocks = jax.lax.map(jax.checkpoint(one), size * jnp.arange(count, dtype=jnp.int32))
    joined = jnp.moveaxis(blocks, 0, -4)
    joined = joined.reshape(*joined.shape[:-4], count * size, *joined.shape[-2:])
    if count * size == length:
        return joined
    return jnp.concatenate([joined, rest(count * size)], axis=-3)
