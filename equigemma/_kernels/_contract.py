"""The product of a weight and an activation, in the formulations that XLA compiles well.

Each gives what `jnp.einsum(eqn, x, weight)` gives, accumulated in float32.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from equigemma._kernels._equation import activation_axes, result_axes, weight_axes
from equigemma._kernels._forms import LONGEST_ROW, fastest, in_stored_order, two_rows
from equigemma._kernels._linear_map import linear_map, tangent_or_none
from equigemma._kernels._product import SMALL, call, few_rows_or_many
from equigemma._typing import Array, Float, Float32


def contract(
    eqn: str, x: Float[Array, "..."], weight: Array, dtype: jnp.dtype | type | None = None
) -> Float[Array, "..."]:
    """`einsum(eqn, x, weight)`, accumulated in float32, in `dtype` (by default that of `x`).

    Float64 activations, as derivatives are checked with, are multiplied and accumulated in float64.

    A weight stored in another dtype, also an integer, is converted; the activation never is.

    Many rows take the time of computing, few rows, as in decoding, that of reading the weight: on
    CPU they have a program of their own (`_product`, `_native`).
    """
    if x.dtype.itemsize > 4:
        product = jnp.einsum(eqn, x, weight.astype(x.dtype))
        return product.astype(x.dtype if dtype is None else dtype)
    inputs = activation_axes(eqn)
    shared = set(inputs) & set(result_axes(eqn))
    if shared and all(x.shape[inputs.index(axis) - len(inputs)] == 1 for axis in shared):
        product = _one_expert(eqn, x, weight)
    else:
        product = PlainProduct(eqn)(x, weight)
    return product.astype(x.dtype if dtype is None else dtype)


@dataclass(frozen=True)
class PlainProduct:
    """With a weight of floats, or of integers that stand for themselves."""

    eqn: str
    sliced: bool = False
    """Whether the weight is a part of an array, which a call would copy first."""

    def __call__(self, x: Array, weight: Array) -> Float32[Array, "..."]:
        if not keeps_order(self.eqn) or not _fits(self.eqn, x, weight):
            return self.reference(x, weight)
        batch = x.shape[: x.ndim - len(activation_axes(self.eqn))]
        return few_rows_or_many(self, math.prod(batch), x, weight)

    def reference(self, x: Array, weight: Array) -> Float32[Array, "..."]:
        return _many_rows(self.eqn, x, weight)

    def has_kernel(self, x: Array, weight: Array) -> bool:
        known = weight.dtype in (jnp.float32, jnp.bfloat16, jnp.int8)
        return known and not self.sliced and weight.size >= SMALL

    def native(self, x: Array, weight: Array) -> Float32[Array, "..."]:
        # The weight keeps its axes: XLA would copy one whose axes are others, if it is bfloat16.
        (matrices, inputs, each), shape = _sizes(self.eqn, x, weight)
        rows, outputs = x.reshape(-1, inputs), matrices * each
        return call("equigemma_product", rows, weight, outputs=outputs, each=each).reshape(shape)

    def portable(self, x: Array, weight: Array) -> Float32[Array, "..."]:
        sizes, shape = _sizes(self.eqn, x, weight)
        rows = x.reshape(-1, sizes[1])
        if len(rows) > 1:
            return self.reference(x, weight)
        if sizes[2] > 1 or rows.size > LONGEST_ROW:
            return two_rows(weight.reshape(sizes), rows[0]).reshape(shape)
        # The constraint keeps the change of shape apart from what is done to the matrix: joined,
        # they would be done to the whole weight.
        matrix = weight.reshape(sizes[:2])
        matrix = with_layout_constraint(matrix, Layout(major_to_minor=(0, 1)))
        form = fastest(weight.dtype.name)
        return form(lambda y: y.astype(jnp.float32), (matrix,), rows[0]).reshape(shape)


def _sizes(eqn: str, x: Array, weight: Array) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """What the axes of a weight amount to, `(matrices, inputs, outputs)`; the result's shape.

    A weight whose inputs come last has one output in each matrix.
    """
    inputs, axes = activation_axes(eqn), weight_axes(eqn)
    first, count = axes.index(inputs), len(inputs)
    parts = weight.shape[:first], weight.shape[first : first + count], weight.shape[first + count :]
    matrices, size, each = map(math.prod, parts)
    outputs = (weight.shape[axes.index(axis)] for axis in result_axes(eqn))
    return (matrices, size, each), (*x.shape[: x.ndim - count], *outputs)


def keeps_order(eqn: str) -> bool:
    """Whether a weight, as it is stored, is a stack of matrices with all inputs on one axis, and
    its outputs are in the order of the result.
    """
    inputs, axes = activation_axes(eqn), weight_axes(eqn)
    return inputs in axes and axes.replace(inputs, "", 1) == result_axes(eqn)


def _one_expert(eqn: str, x: Array, weight: Array) -> Float32[Array, "..."]:
    """The product without the axes, of size 1, that activation, weight and result all have."""
    shape = jax.eval_shape(partial(_many_rows, eqn), x, weight).shape
    inputs, weights = activation_axes(eqn), weight_axes(eqn)
    shared = set(inputs) & set(result_axes(eqn))
    x = jnp.squeeze(x, [inputs.index(axis) - len(inputs) for axis in shared])
    weight = jnp.squeeze(weight, [weights.index(axis) for axis in shared])
    bare = "".join(letter for letter in eqn if letter not in shared)
    return PlainProduct(bare, sliced=True)(x, weight).reshape(shape)


def _many_rows(eqn: str, x: Array, weight: Array) -> Float32[Array, "..."]:
    # Derivatives of wider floats are left to JAX, which has them in forward mode too.
    product = _narrow_product if x.dtype.itemsize == 2 else _product
    return product(eqn, x, weight)


def _product(eqn: str, x: Array, weight: Array) -> Float32[Array, "..."]:
    weight = weight.astype(x.dtype)
    einsum = partial(jnp.einsum, eqn, preferred_element_type=jnp.float32)
    if not keeps_order(eqn) or not _fits(eqn, x, weight):
        return einsum(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=partial(_in_stored_order, eqn), default=einsum)


def _fits(eqn: str, x: Array, weight: Array) -> bool:
    """Whether the sizes of the contracted axes agree."""
    inputs = activation_axes(eqn)
    first = weight_axes(eqn).index(inputs)
    return x.shape[x.ndim - len(inputs) :] == weight.shape[first : first + len(inputs)]


def _in_stored_order(eqn: str, x: Array, weight: Array) -> Float32[Array, "..."]:
    sizes, shape = _sizes(eqn, x, weight)
    return in_stored_order(weight.reshape(sizes), x.reshape(-1, sizes[1])).reshape(shape)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _narrow_product(eqn: str, x: Array, weight: Array) -> Float32[Array, "..."]:
    """The product of narrow floats whose backward pass multiplies narrow floats too.

    JAX would multiply the float32 cotangent of the result, at half of the speed on CPU. And the
    gradient of a weight that is stored in another dtype is never rounded to that of the activation.
    """
    return _product(eqn, x, weight)


@partial(_narrow_product.defjvp, symbolic_zeros=True)
def _narrow_jvp(eqn: str, primals: tuple[Array, Array], tangents: tuple[Any, Any]):
    (x, weight), (dx, dw) = primals, map(tangent_or_none, tangents)
    product = _narrow_product(eqn, x, weight)
    parts = []
    if dx is not None:
        of_x = partial(_product_of_x, eqn), partial(_cotangent_of_x, eqn, x.dtype)
        parts.append(linear_map(*of_x, weight, dx, like=product))
    if dw is not None:
        of_weight = partial(_product, eqn), partial(_cotangent_of_weight, eqn, weight.dtype)
        parts.append(linear_map(*of_weight, x, dw, like=product))
    return product, sum(parts[1:], start=parts[0])


def _product_of_x(eqn: str, weight: Array, x: Array) -> Float32[Array, "..."]:
    return _product(eqn, x, weight)


def _cotangent_of_x(eqn: str, dtype: jnp.dtype, weight: Array, cotangent: Array) -> Array:
    inputs, outputs = activation_axes(eqn), result_axes(eqn)
    transposed = f"...{outputs},{weight_axes(eqn)}->...{inputs}"
    return _product(transposed, cotangent.astype(dtype), weight).astype(dtype)


def _cotangent_of_weight(eqn: str, dtype: jnp.dtype, x: Array, cotangent: Array) -> Array:
    cotangent = cotangent.astype(x.dtype)
    inputs, outputs, axes = activation_axes(eqn), result_axes(eqn), weight_axes(eqn)
    if set(inputs) & set(outputs):
        rows = _rows(x, len(inputs)), _rows(cotangent, len(outputs))
        wide = (factor.astype(jnp.float32) for factor in rows)
        return jnp.einsum(f"z{inputs},z{outputs}->{axes}", *wide).astype(dtype)
    factors = [(x, inputs), (cotangent, outputs)]
    # In the order of the weight's axes: an optimizer would read a transposed one with a stride.
    if axes.endswith(inputs):
        factors.reverse()
    rows = [_rows(factor, len(letters)) for factor, letters in factors]
    flat = summed_products(*(f.reshape(len(f), math.prod(f.shape[1:])) for f in rows))
    sizes = [size for factor in rows for size in factor.shape[1:]]
    letters = "".join(letters for _, letters in factors)
    return jnp.einsum(f"{letters}->{axes}", flat.reshape(sizes)).astype(dtype)


def _rows(x: Array, axes: int) -> Array:
    return x.reshape(-1, *x.shape[x.ndim - axes :])


def summed_products(
    left: Float[Array, "rows inputs"], right: Float[Array, "rows outputs"]
) -> Float32[Array, "inputs outputs"]:
    """`leftᵀ · right`, in float32: the gradient of a weight.

    XLA on CPU has no fast product of bfloat16 that sums over the first axis of both. So one of them
    is transposed in memory, where XLA would only say that it is.
    """

    def transposed(left: Array, right: Array) -> Array:
        columns = with_layout_constraint(left.T, Layout(major_to_minor=(0, 1)))
        return jnp.dot(columns, right, preferred_element_type=jnp.float32)

    def plain(left: Array, right: Array) -> Array:
        return jnp.einsum("zi,zo->io", left, right, preferred_element_type=jnp.float32)

    if left.dtype.itemsize > 2:
        return plain(left, right)
    return jax.lax.platform_dependent(left, right, cpu=transposed, default=plain)
