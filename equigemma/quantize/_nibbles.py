"""Four bits with one scale for each group of numbers in a row, as in the blocks of Q4_0.

It saves memory, not time: XLA on CPU takes two products for the two numbers of a byte.
"""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from equigemma._kernels import contract
from equigemma._typing import Array, Float, Float16, Float32, Int, Int8
from equigemma.quantize._groups import in_groups


class NibbleGroups(eqx.Module):
    """Rows of integers from −8 to 7; number i of a row counts times scale ⌊i / group⌋ of it.

    A byte holds a number of the first half of a row below, and one of the second half above.
    """

    weight: Int8[Array, "*outputs half"]
    scale: Float16[Array, "*outputs groups"]
    group: int = eqx.field(static=True)
    inputs: int = eqx.field(static=True)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The shape of all rows."""
        return self.weight.shape[:-1]

    def matrix(self) -> "NibbleGroups":
        """The same rows as those of one matrix."""
        weight, scale = (x.reshape(-1, x.shape[-1]) for x in (self.weight, self.scale))
        return NibbleGroups(weight=weight, scale=scale, group=self.group, inputs=self.inputs)

    def floats(self) -> Float32[Array, "*outputs inputs"]:
        """What the integers stand for, exactly."""
        return _widened(self.weight, self.scale, self.group, self.inputs)

    def rows(self, index: Int[Array, "*B"]) -> Float32[Array, "*B inputs"]:
        """Some of the rows, as floats."""
        return _widened(self.weight[index], self.scale[index], self.group, self.inputs)

    def times(self, x: Float[Array, "*B inputs"]) -> Float32[Array, "*B outputs"]:
        """`x` times the transpose of the only matrix that the rows are."""
        many = partial(_many_rows, self.group, self.inputs)
        if math.prod(x.shape[:-1]) != 1:
            return many(x, self.weight, self.scale)
        one = partial(_one_row, self.group)
        return jax.lax.platform_dependent(x, self.weight, self.scale, cpu=one, default=many)


def _one_row(group: int, x: Array, weight: Array, scale: Array) -> Array:
    """Two products with all bytes, each of one half of them; nothing is unpacked in memory."""
    half, groups = weight.shape[-1], weight.shape[-1] // group
    row = jnp.pad(x.reshape(-1).astype(jnp.float32), (0, 2 * half - x.shape[-1]))
    scale = jnp.pad(scale, ((0, 0), (0, 2 * groups - scale.shape[-1])))
    weight, scale, row = jax.lax.optimization_barrier((weight, scale, row))
    inputs_first = Layout(major_to_minor=(1, 0))
    columns, scales = (with_layout_constraint(y.T, inputs_first) for y in (weight, scale))

    def spread(part: Array) -> Array:
        wide = jnp.broadcast_to(part.astype(jnp.float32)[:, None], (groups, group, part.shape[1]))
        return wide.reshape(half, -1)

    lower = jnp.dot(row[:half], _lower(columns) * spread(scales[:groups]))
    upper = jnp.dot(row[half:], _upper(columns) * spread(scales[groups:]))
    # Each is made in memory; added as they come, both would be computed number by number.
    both = jnp.zeros((2, len(weight)), jnp.float32)
    both = jax.lax.dynamic_update_slice(both, lower[None], (0, 0))
    both = jax.lax.dynamic_update_slice(both, upper[None], (1, 0))
    return both.sum(axis=0).reshape(*x.shape[:-1], -1)


def _many_rows(group: int, inputs: int, x: Array, weight: Array, scale: Array) -> Array:
    # Tied to the activations: floats of all weights are not made before a loop over chunks.
    weight, scale, x = jax.lax.optimization_barrier((weight, scale, x))
    matrix = _widened(weight, scale, group, inputs).astype(x.dtype)
    return contract("...D,FD->...F", x, matrix, jnp.float32)


def _lower(packed: Array) -> Array:
    # Sixteen times the number that is meant, and so is the upper one: `_STEP` is for both.
    return (packed << 4).astype(jnp.float32) * _STEP


def _upper(packed: Array) -> Array:
    return (packed & jnp.int8(-16)).astype(jnp.float32) * _STEP


_STEP = 1 / 16


def _widened(weight: Array, scale: Array, group: int, inputs: int) -> Array:
    wide = jnp.concatenate([_lower(weight), _upper(weight)], axis=-1)[..., :inputs]
    return wide * jnp.repeat(scale.astype(jnp.float32), group, axis=-1)[..., :inputs]


@partial(jax.jit, static_argnums=1)
def nibble_groups(rows: Float[Array, "*outputs inputs"], group: int) -> NibbleGroups:
    """Each group divided by its scale, which makes its largest number −8, and rounded.

    **Source:** ggml `ggml-quants.c::quantize_row_q4_0_ref`.
    """
    wide = in_groups(rows.astype(jnp.float32), group)
    largest = jnp.argmax(jnp.abs(wide), axis=-1, keepdims=True)
    scale = jnp.take_along_axis(wide, largest, axis=-1) / -8
    quotient = wide * jnp.where(scale != 0, 1 / scale, 0)
    whole = jnp.clip(jnp.floor(quotient + 8.5), 0, 15).astype(jnp.int8) - 8
    groups = whole.shape[-2]
    half = -(-groups // 2) * group
    flat = whole.reshape(*rows.shape[:-1], -1)
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, 2 * half - flat.shape[-1])])
    packed = (flat[..., :half] & jnp.int8(15)) | (flat[..., half:] << 4)
    return NibbleGroups(
        weight=packed,
        scale=scale[..., 0].astype(jnp.float16),
        group=group,
        inputs=rows.shape[-1],
    )
