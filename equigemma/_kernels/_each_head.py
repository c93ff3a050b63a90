"""Attention of every key head: all at once, or one after the other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from equigemma._typing import Array, Bool, Float


MANY = 1 << 16
"""Logits of one key head from which on a product takes longer than to start it."""


def each_head(
    mix: Callable[..., Array],
    rows: Float[Array, "*B K rows H"],
    k: Float[Array, "*B K S H"],
    v: Float[Array, "*B K S H"],
    mask: Bool[Array, "*B L S"],
) -> Float[Array, "*B K rows H"]:
    """`jax.vmap(jax.vmap(mix, (0, 0, 0, None)))(rows, k, v, mask)` for one batch axis.

    On CPU one head after the other, where they are large: of bfloat16 XLA multiplies a stack of
    matrices at a fraction of the speed of one; seen with jax 0.10.2.

    **Arguments:** `mix`: from `[rows H]`, `[S H]`, `[S H]` and `[L S]` to `[rows H]`.
    """
    shape, heads = rows.shape, k.shape[-3]
    rows, k, v, masks = (x.reshape(-1, *x.shape[-2:]) for x in (rows, k, v, mask))

    def at_once(rows: Array, k: Array, v: Array, masks: Array):
        stacks = (x.reshape(len(masks), heads, *x.shape[1:]) for x in (rows, k, v))
        each = jax.vmap(jax.vmap(mix, in_axes=(0, 0, 0, None)))
        return each(*stacks, masks).reshape(rows.shape)

    def in_turn(rows: Array, k: Array, v: Array, masks: Array):
        numbers = jnp.arange(len(rows)) // heads

        def head(one: tuple[Array, Array, Array, Array]):
            rows, k, v, number = one
            return mix(rows, k, v, masks[number])

        return jax.lax.map(head, (rows, k, v, numbers))

    if len(rows) == 1:
        mixed = mix(rows[0], k[0], v[0], masks[0])
    elif rows.shape[-2] * k.shape[-2] < MANY:
        mixed = at_once(rows, k, v, masks)
    else:
        mixed = jax.lax.platform_dependent(rows, k, v, masks, cpu=in_turn, default=at_once)
    return mixed.reshape(shape)
