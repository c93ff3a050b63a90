"""One slot of a KV cache replaced, where the cache is."""

from functools import partial

import jax
import jax.numpy as jnp

from equigemma._typing import Array, Bool, Int, Shaped


COPIES_SLICES = jax.__version_info__ < (0, 11)
"""Whether XLA on CPU updates a slice of bfloat16 by way of a float32 copy, and makes a selection in
place; seen with 0.8.1 and 0.10.2. With 0.12.0.1 it is the other way round."""

REPEATS_SELECTIONS = jax.__version_info__ < (0, 10)
"""Whether it repeats such a selection, of a single matrix, for each of its readers, each time on a
copy; seen with 0.8.1 and 0.9.0, not with 0.10.0."""


def update_slot(
    slots: Shaped[Array, "..."],
    new: Shaped[Array, "..."],
    slot: Int[Array, ""],
    *,
    axis: int,
    real: Bool[Array, ""] | bool = True,
) -> Shaped[Array, "..."]:
    """`slots` with `new` at `slot` of `axis`, where `new` has one; unchanged unless `real`.

    `jnp.where(real, slots.at[..., slot].set(new), slots)`.
    """
    operands = slots, new.astype(slots.dtype), slot, jnp.asarray(real)
    update = partial(_update, axis)
    if slots.dtype == jnp.bfloat16 and COPIES_SLICES:
        repeats = REPEATS_SELECTIONS and slots.size == slots.shape[axis] * slots.shape[-1]
        select = partial(_select_in_loop if repeats else _select, axis)
        return jax.lax.platform_dependent(*operands, cpu=select, default=update)
    return update(*operands)


def _update(axis: int, slots: Array, new: Array, slot: Array, real: Array) -> Array:
    # Two slots are written, one of them (unless `real`, both) with what was there: an update of one
    # slot XLA on CPU repeats for each of its readers, each time on a copy.
    count = min(2, slots.shape[axis])
    start = jnp.minimum(slot, slots.shape[axis] - count)
    old = jax.lax.dynamic_slice_in_dim(slots, start, count, axis)
    here = (start + jnp.arange(count) == slot) & real
    pair = jnp.where(_along(axis, here, slots.ndim), new, old)
    return jax.lax.dynamic_update_slice_in_dim(slots, pair, start, axis)


def _select(axis: int, slots: Array, new: Array, slot: Array, real: Array) -> Array:
    here = (jnp.arange(slots.shape[axis]) == slot) & real
    return jnp.where(_along(axis, here, slots.ndim), new, slots)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _select_in_loop(axis: int, slots: Array, new: Array, slot: Array, real: Array) -> Array:
    """`_select` in a loop of at most one round: what a loop gives is not computed again."""

    def select(_, slots: Array) -> Array:
        return _select(axis, slots, new, slot, jnp.asarray(True))

    return jax.lax.fori_loop(0, real.astype(jnp.int32), select, slots)


@_select_in_loop.defjvp
def _of_both(axis: int, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    slots, new, slot, real = primals
    of_slots, of_new, *_ = tangents
    result = _select_in_loop(axis, slots, new, slot, real)
    return result, _select(axis, of_slots, of_new, slot, real)


def _along(axis: int, flags: Array, rank: int) -> Array:
    return jnp.expand_dims(flags, [other for other in range(rank) if other != axis % rank])
