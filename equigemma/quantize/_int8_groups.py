"""Eight bits with one scale for each group of numbers in a row, as in the blocks of Q8_0.

A large number spoils the steps of its group only, not those of its row.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import LONGEST_ROW, GroupedExperts, GroupedProduct, widened_groups
from equigemma._typing import Array, Float, Float16, Float32, Int, Int8


class Int8Groups(eqx.Module):
    """Rows of integers; number i of a row counts times scale ⌊i / group⌋ of it.

    Scales are float16, as in files. The last group may be shorter than the others.
    """

    weight: Int8[Array, "*outputs inputs"]
    scale: Float16[Array, "*outputs groups"]
    group_size: int = eqx.field(static=True)

    @property
    def inputs(self) -> int:
        """Numbers in a row."""
        return self.weight.shape[-1]

    @property
    def outputs(self) -> tuple[int, ...]:
        """The shape of all rows."""
        return self.weight.shape[:-1]

    def matrix(self) -> "Int8Groups":
        """The same rows as those of one matrix."""
        weight, scale = (x.reshape(-1, x.shape[-1]) for x in (self.weight, self.scale))
        return Int8Groups(weight=weight, scale=scale, group_size=self.group_size)

    def floats(self) -> Float32[Array, "*outputs inputs"]:
        """The dequantized weight, exactly."""
        return widened_groups(self.weight, self.scale, 8, self.group_size, self.inputs)

    def rows(self, index: Int[Array, "*B"]) -> Float32[Array, "*B inputs"]:
        """Some of the rows, as floats."""
        return widened_groups(
            self.weight[index], self.scale[index], 8, self.group_size, self.inputs
        )

    def matmul_t(self, x: Float[Array, "*B inputs"]) -> Float32[Array, "*B outputs"]:
        """`x` times the transpose of the only matrix that the rows are."""
        return GroupedProduct(8, self.group_size, self.inputs)(x, self.weight, self.scale)

    def times_by_expert(
        self, x: Float[Array, "rows inputs"], expert: Int[Array, " rows"]
    ) -> Float32[Array, "rows ..."]:
        """Each row times the transpose of the matrix of its expert, which the first axis counts.

        **Arguments:** `expert`: of each row, in ascending order.
        """
        product = GroupedExperts(8, self.group_size, self.inputs)
        weight, scale = (y.reshape(len(y), -1, y.shape[-1]) for y in (self.weight, self.scale))
        return product(x, weight, scale, expert).reshape(len(x), *self.outputs[1:])


@partial(jax.jit, static_argnums=1)
def int8_groups(rows: Float[Array, "*outputs inputs"], group_size: int) -> Int8Groups:
    """Each group divided by its scale, which makes its largest number 127 or −127, and rounded.

    **Source:** ggml `ggml-quants.c::quantize_row_q8_0_ref`: the scale is rounded to float16 only
    after the division, and halves go away from zero.
    """
    wide = in_groups(rows.astype(jnp.float32), group_size)
    scale = jnp.abs(wide).max(axis=-1) / 127
    quotient = wide * jnp.where(scale > 0, 1 / scale, 0)[..., None]
    whole = jnp.sign(quotient) * away_from_zero(jnp.abs(quotient))
    weight = whole.astype(jnp.int8).reshape(*rows.shape[:-1], -1)[..., : rows.shape[-1]]
    return Int8Groups(weight=weight, scale=scale.astype(jnp.float16), group_size=group_size)


def column_cuts(inputs: int, group_size: int) -> list[int]:
    """Where a wide matrix is cut into pieces of about equally many columns, and no group is."""
    groups = -(-inputs // group_size)
    pieces = -(-groups // max(1, LONGEST_ROW // group_size))
    return [groups * piece // pieces * group_size for piece in range(1, pieces)]


def in_groups(rows: Array, group_size: int) -> Float[Array, "*outputs groups group"]:
    """Rows cut into groups, the last one filled up with zeros."""
    short = -rows.shape[-1] % group_size
    padded = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, short)])
    return padded.reshape(*rows.shape[:-1], -1, group_size)


def away_from_zero(size: Array) -> Array:
    """A number that is not negative, rounded; a half upwards."""
    whole = jnp.floor(size)
    return whole + jnp.floor(2 * (size - whole))
