"""Rows of several experts in blocks of one expert each, and loops over the blocks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from equigemma._kernels._barrier import not_hoisted
from equigemma._typing import Array, Bool, Int


class Blocks(NamedTuple):
    """Where each row goes: n blocks of m rows, every block for one expert."""

    expert: Int[Array, " n"]
    filled: Bool[Array, " n"]
    row: Int[Array, "n m"]  # any row where the block has room left
    place: Int[Array, " rows"]  # among the n · m rows of all blocks


def blocks_of(expert: Int[Array, " rows"], experts: int) -> Blocks:
    """The blocks of rows that are sorted by expert."""
    rows, size = len(expert), block_rows(len(expert), experts)
    index = jnp.arange(rows)
    if size == 1:
        return Blocks(expert, jnp.ones(rows, bool), index[:, None], index)
    counts = jnp.bincount(expert, length=experts)
    each = -(-counts // size)
    ends = jnp.cumsum(each)
    place = (ends - each)[expert] * size + index - (jnp.cumsum(counts) - counts)[expert]
    # Every expert that is chosen at all may leave the rest of one block empty.
    count = (rows + min(experts, rows) * (size - 1)) // size
    block = jnp.arange(count)
    return Blocks(
        expert=jnp.minimum(jnp.searchsorted(ends, block, side="right"), experts - 1),
        filled=block < ends[-1],
        row=jnp.zeros(count * size, index.dtype).at[place].set(index).reshape(-1, size),
        place=place,
    )


MOST_ROWS = 128
"""Rows of a block at most: a larger product is not faster for each row."""


def block_rows(rows: int, experts: int) -> int:
    """Rows of a block: about what one expert gets, so that few blocks are padded and few split."""
    return min(MOST_ROWS, 1 << max(0, (rows // experts).bit_length() - 1))


def each_block(
    compute: Callable[..., Array], x: Array, expert: Int[Array, " rows"], *stacks: Array
) -> Array:
    """`compute(rows, *(stack[e] for stack in stacks))` of the rows of each expert e, in order.

    `jnp.stack([compute(row[None], *(s[e] for s in stacks))[0] for row, e in zip(x, expert)])`.

    **Arguments:** `x`: `[rows, ...]`, sorted by `expert`. `stacks`: arrays with an axis for experts
    in front.
    """
    blocks = blocks_of(expert, len(stacks[0]))

    def one(index: Array, rows: Array) -> Array:
        return compute(rows, *slices(stacks, index))

    def block(given: tuple[Array, Array, Array]) -> Array:
        index, filled, rows = given
        if len(rows) == 1:
            return one(index, rows)
        blank = jax.eval_shape(one, index, rows)
        empty = jnp.zeros(blank.shape, blank.dtype)
        return jax.lax.cond(filled, one, lambda *_: empty, index, rows)

    results = jax.lax.map(block, (blocks.expert, blocks.filled, x[blocks.row]))
    return results.reshape(-1, *results.shape[2:])[blocks.place]


def summed_over_blocks(
    compute: Callable[..., Array], expert: Int[Array, " rows"], experts: int, *rows: Array
) -> Array:
    """`compute(*rows)` of the rows of each expert, which adds up what rows give; `[experts, ...]`.

    `jnp.stack([compute(*(r * (expert == e)[:, None] for r in rows)) for e in range(experts)])`.
    """
    blocks = blocks_of(expert, experts)
    size = blocks.row.shape[1]
    taken = jnp.zeros(blocks.row.size, bool).at[blocks.place].set(True).reshape(-1, size)

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        index, row, taken = block
        own = (jnp.where(jnp.expand_dims(taken, range(1, r.ndim)), r[row], 0) for r in rows)
        return total.at[index].add(compute(*own)), None

    one = jax.eval_shape(compute, *(r[blocks.row[0]] for r in rows))
    total = jnp.zeros((experts, *one.shape), one.dtype)
    return jax.lax.scan(add, total, (blocks.expert, blocks.row, taken))[0]


def slices(stacks: tuple[Array, ...], index: Int[Array, ""]) -> tuple[Array, ...]:
    """`tuple(stack[index] for stack in stacks)`, sliced in each step of a loop over `index`."""
    late, index = not_hoisted(stacks, until=index)
    take = jax.lax.dynamic_index_in_dim
    return tuple(take(stack, index, keepdims=False) for stack in late)
