"""The index of the largest number."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, Int


BLOCK = 512
"""Numbers of a row, at most, of which the largest is found first."""


def argmax(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The index of the largest logit; of equals, the first. −1 for a row of which one is NaN, or
    none above −inf. Elsewhere `jnp.argmax(logits, axis=-1)`.

    XLA on CPU finds an index one number after the other, but a largest number in vectors, seen with
    jax 0.10.2 and 0.12.0.1.
    """
    block = math.gcd(logits.shape[-1], BLOCK)
    if block < 16:
        return _by_two_reductions(logits)
    by_blocks = partial(_by_blocks, block)
    return jax.lax.platform_dependent(logits, cpu=by_blocks, default=_by_two_reductions)


def _by_blocks(size: int, logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """Reads all logits once: the index is looked for in the first block with the largest."""
    blocks = logits.reshape(*logits.shape[:-1], -1, size)
    largest = blocks.max(axis=-1)
    top = largest.max(axis=-1, keepdims=True)
    first = jnp.argmax(largest == top, axis=-1)
    block = jnp.take_along_axis(blocks, first[..., None, None], axis=-2)[..., 0, :]
    return _where_found(top, first * size + jnp.argmax(block == top, axis=-1))


def _by_two_reductions(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    top = logits.max(axis=-1, keepdims=True)
    return _where_found(top, jnp.where(logits == top, ids, logits.shape[-1] - 1).min(axis=-1))


def _where_found(top: Float[Array, "*B 1"], index: Int[Array, "*B"]) -> Int[Array, "*B"]:
    # Nothing is larger than −inf in a row with NaN.
    return jnp.where(top[..., 0] > -jnp.inf, index, -1).astype(jnp.int32)
