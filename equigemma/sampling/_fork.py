"""Several continuations of one text: its memory copied for each, or handed from one to another.

A batch of shape `*B` becomes `*B n`. Every array of a cache leads with the batch, so these are
one line each; they take any other such pytree as well.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

from equigemma._typing import Array, Int, typed
from equigemma.nn import Cache


_T = TypeVar("_T")


@typed
def fork(cache: Cache, copies: int) -> Cache:
    """The cache `copies` times over, along a new axis after those of the batch.

    **Arguments:**

    - `cache`: as `generate` or a model returns it.
    - `copies`: how many continuations share what is in it.

    **Returns:** a cache with the batch `*B copies`.

    **Raises:** `ValueError` if `copies < 1`.
    """
    if copies < 1:
        raise ValueError(f"A fork needs at least one copy, got {copies}.")
    return tile(cache, cache.length.ndim, copies)


def tile(tree: _T, axis: int, copies: int) -> _T:
    """Every array of a pytree `copies` times over, along a new axis."""

    def one(leaf: Array):
        return jnp.broadcast_to(
            jnp.expand_dims(leaf, axis), (*leaf.shape[:axis], copies, *leaf.shape[axis:])
        )

    return jax.tree.map(one, tree)


def select_rows(tree: _T, rows: Int[Array, "*B m"]) -> _T:
    """Of every array `[*B n ...]` the entries `rows` of its axis n: `[*B m ...]`."""

    def one(leaf: Array, rows: Array):
        return leaf[rows]

    for _ in range(rows.ndim - 1):
        one = jax.vmap(one)
    return jax.tree.map(lambda leaf: one(leaf, rows), tree)
