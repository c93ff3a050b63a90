"""Products with rows of integers, eight or four bits each, in groups that have a scale each."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from equigemma._kernels._barrier import not_hoisted
from equigemma._kernels._contract import contract
from equigemma._kernels._forms import fastest
from equigemma._kernels._product import SMALL, call, few_rows_or_many
from equigemma._typing import Array, Float, Float16, Float32, Int8


@dataclass(frozen=True)
class GroupedProduct:
    """`x` times the transpose of a matrix of integers with scales.

    A byte of the matrix holds an integer of 8 bits, or one of 4 bits of the first half of a row
    below, and one of the second half above.
    """

    bits: Literal[4, 8]
    group: int
    inputs: int
    sliced: bool = False
    """Whether the weight is a part of an array, which a call would copy first."""

    def __call__(
        self,
        x: Float[Array, "*B inputs"],
        weight: Int8[Array, "outputs bytes"],
        scale: Float16[Array, "outputs groups"],
    ) -> Float32[Array, "*B outputs"]:
        return few_rows_or_many(self, math.prod(x.shape[:-1]), x, weight, scale)

    def reference(self, x: Array, weight: Array, scale: Array) -> Float32[Array, "..."]:
        # Tied to the activations: floats of all weights are not made before a loop over chunks.
        (weight, scale), x = not_hoisted((weight, scale), until=x)
        matrix = widened_groups(weight, scale, self.bits, self.group, self.inputs).astype(x.dtype)
        return contract("...D,FD->...F", x, matrix, jnp.float32)

    def has_kernel(self, x: Array, weight: Array, scale: Array) -> bool:
        known = self.group == 32 and scale.dtype == jnp.float16 and x.dtype.itemsize <= 4
        return known and not self.sliced and weight.size >= SMALL

    def native(self, x: Array, weight: Array, scale: Array) -> Float32[Array, "..."]:
        rows, name = x.reshape(-1, self.inputs), f"equigemma_int{self.bits}_groups"
        product = call(name, rows, weight, scale, outputs=len(weight))
        return product.reshape(*x.shape[:-1], -1)

    def portable(self, x: Array, weight: Array, scale: Array) -> Float32[Array, "..."]:
        if math.prod(x.shape[:-1]) > 1:
            return self.reference(x, weight, scale)
        row, one = x.reshape(-1), _one_row_of_bytes if self.bits == 8 else _one_row_of_nibbles
        return one(self.group, row, weight, scale).reshape(*x.shape[:-1], -1)


def widened_groups(
    weight: Int8[Array, "*outputs bytes"],
    scale: Float16[Array, "*outputs groups"],
    bits: int,
    group: int,
    inputs: int,
) -> Float32[Array, "*outputs inputs"]:
    """What the integers stand for, exactly."""
    parts = [weight.astype(jnp.float32)] if bits == 8 else [_lower(weight), _upper(weight)]
    wide = jnp.concatenate(parts, axis=-1)[..., :inputs]
    return wide * _each(scale, group)[..., :inputs]


def _each(scale: Array, group: int) -> Float32[Array, "..."]:
    """The scale of each number."""
    shape = (*scale.shape, group)
    each = jnp.broadcast_to(scale.astype(jnp.float32)[..., None], shape)
    return each.reshape(*scale.shape[:-1], -1)


# Sixteen times the number that is meant.
_STEP = 1 / 16


def _lower(packed: Array) -> Float32[Array, "..."]:
    return (packed << 4).astype(jnp.float32) * _STEP


def _upper(packed: Array) -> Float32[Array, "..."]:
    return (packed & jnp.int8(-16)).astype(jnp.float32) * _STEP


def _one_row_of_bytes(group: int, row: Array, weight: Array, scale: Array) -> Array:
    """Scaling in the product rather than after it costs a sixth of its speed."""

    def widened(weight: Array, scale: Array) -> Array:
        return weight.astype(jnp.float32) * _each(scale, group)[:, : weight.shape[1]]

    return fastest("groups")(widened, (weight, scale), row)


def _one_row_of_nibbles(group: int, row: Array, weight: Array, scale: Array) -> Array:
    """Two products with all bytes, each of one half of them; nothing is unpacked in memory."""
    half, groups = weight.shape[1], weight.shape[1] // group
    row = jnp.pad(row.astype(jnp.float32), (0, 2 * half - len(row)))
    scale = jnp.pad(scale, ((0, 0), (0, 2 * groups - scale.shape[1])))

    def product(unpacked: Callable[[Array], Array], rows: slice, columns: slice) -> Array:
        def widened(weight: Array, scale: Array) -> Array:
            return unpacked(weight) * _each(scale, group)

        return fastest("groups")(widened, (weight, scale[:, columns]), row[rows])

    lower = product(_lower, slice(None, half), slice(None, groups))
    upper = product(_upper, slice(half, None), slice(groups, None))
    # Each is made in memory; added as they come, both would be computed number by number.
    both = jnp.zeros((2, len(weight)), jnp.float32)
    both = jax.lax.dynamic_update_slice(both, lower[None], (0, 0))
    both = jax.lax.dynamic_update_slice(both, upper[None], (1, 0))
    return both.sum(axis=0)
