"""Four bits with one scale for each group of numbers in a row, as in the blocks of Q4_0."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import GroupedExperts, GroupedProduct, widened_groups
from equigemma._typing import Array, Float, Float16, Float32, Int, Int8
from equigemma.quantize._int8_groups import in_groups


class Int4Groups(eqx.Module):
    """Rows of integers from −8 to 7; number i of a row counts times scale ⌊i / group⌋ of it.

    A byte holds a number of the first half of a row below, and one of the second half above.
    """

    weight: Int8[Array, "*outputs half"]
    scale: Float16[Array, "*outputs groups"]
    group_size: int = eqx.field(static=True)
    inputs: int = eqx.field(static=True)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The shape of all rows."""
        return self.weight.shape[:-1]

    def matrix(self) -> "Int4Groups":
        """The same rows as those of one matrix."""
        weight, scale = (x.reshape(-1, x.shape[-1]) for x in (self.weight, self.scale))
        return Int4Groups(
            weight=weight, scale=scale, group_size=self.group_size, inputs=self.inputs
        )

    def floats(self) -> Float32[Array, "*outputs inputs"]:
        """The dequantized weight, exactly."""
        return widened_groups(self.weight, self.scale, 4, self.group_size, self.inputs)

    def rows(self, index: Int[Array, "*B"]) -> Float32[Array, "*B inputs"]:
        """Some of the rows, as floats."""
        return widened_groups(
            self.weight[index], self.scale[index], 4, self.group_size, self.inputs
        )

    def matmul_t(self, x: Float[Array, "*B inputs"]) -> Float32[Array, "*B outputs"]:
        """`x` times the transpose of the only matrix that the rows are."""
        return GroupedProduct(4, self.group_size, self.inputs)(x, self.weight, self.scale)

    def times_by_expert(
        self, x: Float[Array, "rows inputs"], expert: Int[Array, " rows"]
    ) -> Float32[Array, "rows ..."]:
        """Each row times the transpose of the matrix of its expert, which the first axis counts.

        **Arguments:** `expert`: of each row, in ascending order.
        """
        product = GroupedExperts(4, self.group_size, self.inputs)
        weight, scale = (y.reshape(len(y), -1, y.shape[-1]) for y in (self.weight, self.scale))
        return product(x, weight, scale, expert).reshape(len(x), *self.outputs[1:])


@partial(jax.jit, static_argnums=1)
def int4_groups(rows: Float[Array, "*outputs inputs"], group_size: int) -> Int4Groups:
    """Each group divided by its scale, which makes its largest number −8, and rounded.

    **Source:** ggml `ggml-quants.c::quantize_row_q4_0_ref`.
    """
    wide = in_groups(rows.astype(jnp.float32), group_size)
    largest = jnp.argmax(jnp.abs(wide), axis=-1, keepdims=True)
    scale = jnp.take_along_axis(wide, largest, axis=-1) / -8
    quotient = wide * jnp.where(scale != 0, 1 / scale, 0)
    whole = jnp.clip(jnp.floor(quotient + 8.5), 0, 15).astype(jnp.int8) - 8
    groups = whole.shape[-2]
    half = -(-groups // 2) * group_size
    flat = whole.reshape(*rows.shape[:-1], -1)
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, 2 * half - flat.shape[-1])])
    packed = (flat[..., :half] & jnp.int8(15)) | (flat[..., half:] << 4)
    return Int4Groups(
        weight=packed,
        scale=scale[..., 0].astype(jnp.float16),
        group_size=group_size,
        inputs=rows.shape[-1],
    )
