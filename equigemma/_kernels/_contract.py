"""The product of a weight and an activation, in the formulations that XLA compiles well.

Each gives what `jnp.einsum(eqn, x, weight)` gives, accumulated in float32.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from equigemma._kernels._equation import activation_axes, result_axes, weight_axes
from equigemma._kernels._linear_map import linear_map, tangent_or_none
from equigemma._typing import Array, Float, Float32, Shaped


def contract(
    eqn: str, x: Float[Array, "..."], weight: Array, dtype: jnp.dtype | type | None = None
) -> Float[Array, "..."]:
    """`einsum(eqn, x, weight)`, accumulated in float32, in `dtype` (by default that of `x`).

    Float64 activations, as derivatives are checked with, are multiplied and accumulated in float64.

    A weight stored in another dtype, also an integer, is converted; the activation never is.

    Many rows take the time of computing, one row, as in decoding, that of reading the weight, and
    on CPU the two want different programs. One row reads a matrix `[outputs, inputs]` as fast as
    memory gives it, a weight in another layout at half of that or less. Under `vmap` one row is one
    of many, which is slow there: decode a batch along a batch axis.
    """
    if x.dtype.itemsize > 4:
        product = jnp.einsum(eqn, x, weight.astype(x.dtype))
        return product.astype(x.dtype if dtype is None else dtype)
    inputs = activation_axes(eqn)
    rows = math.prod(x.shape[: x.ndim - len(inputs)])
    shared = set(inputs) & set(result_axes(eqn))
    if shared and all(x.shape[inputs.index(axis) - len(inputs)] == 1 for axis in shared):
        return _one_expert(eqn, x, weight, dtype)
    if rows == 1 and _keeps_order(eqn) and _fits(eqn, x, weight):
        product = jax.lax.platform_dependent(
            x, weight, cpu=partial(_one_row, eqn), default=partial(_many_rows, eqn)
        )
    else:
        product = _many_rows(eqn, x, weight)
    return product.astype(x.dtype if dtype is None else dtype)


def _keeps_order(eqn: str) -> bool:
    """Whether a weight, as it is stored, is a stack of matrices with all inputs on one axis."""
    inputs = activation_axes(eqn)
    return inputs in weight_axes(eqn) and not set(inputs) & set(result_axes(eqn))


def _one_expert(eqn: str, x: Array, weight: Array, dtype: jnp.dtype | type | None) -> Array:
    """The product without the axes, of size 1, that activation, weight and result all have."""
    shape = jax.eval_shape(partial(_many_rows, eqn), x, weight).shape
    inputs, weights = activation_axes(eqn), weight_axes(eqn)
    shared = set(inputs) & set(result_axes(eqn))
    x = jnp.squeeze(x, [inputs.index(axis) - len(inputs) for axis in shared])
    weight = jnp.squeeze(weight, [weights.index(axis) for axis in shared])
    bare = "".join(letter for letter in eqn if letter not in shared)
    return contract(bare, x, weight, dtype).reshape(shape)


def _many_rows(eqn: str, x: Array, weight: Array) -> Float32[Array, "..."]:
    # Derivatives of wider floats are left to JAX, which has them in forward mode too.
    product = _narrow_product if x.dtype.itemsize == 2 else _product
    return product(eqn, x, weight)


def _product(eqn: str, x: Array, weight: Array) -> Float32[Array, "..."]:
    weight = weight.astype(x.dtype)
    einsum = partial(jnp.einsum, eqn, preferred_element_type=jnp.float32)
    if not _keeps_order(eqn) or not _fits(eqn, x, weight):
        return einsum(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=partial(_in_stored_order, eqn), default=einsum)


def _fits(eqn: str, x: Array, weight: Array) -> bool:
    """Whether the sizes of the contracted axes agree."""
    inputs = activation_axes(eqn)
    first = weight_axes(eqn).index(inputs)
    return x.shape[x.ndim - len(inputs) :] == weight.shape[first : first + len(inputs)]


def _in_stored_order(eqn: str, x: Array, weight: Array) -> Float32[Array, "..."]:
    """One product for each index of the weight's outer axes: XLA on CPU would transpose a weight
    of more than two axes before a single one.
    """
    inputs, axes = activation_axes(eqn), weight_axes(eqn)
    batch, sizes = x.shape[: x.ndim - len(inputs)], x.shape[x.ndim - len(inputs) :]
    first, size = axes.index(inputs), math.prod(sizes)
    if axes.endswith(inputs):
        matrices, contracted = weight.reshape(1, -1, size), ((2,), (2,))
    else:
        outer = math.prod(weight.shape[:first])
        matrices, contracted = weight.reshape(outer, size, -1), ((2,), (1,))
    rows = jnp.broadcast_to(x.reshape(-1, size), (len(matrices), math.prod(batch), size))
    product = jax.lax.dot_general(
        rows, matrices, (contracted, ((0,), (0,))), preferred_element_type=jnp.float32
    )
    result = [length for axis, length in zip(axes, weight.shape, strict=True) if axis not in inputs]
    return jnp.moveaxis(product, 0, 1).reshape(*batch, *result)


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
    """`leftᵀ · right`, in float32: the slope of a weight.

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


LONGEST_ROW = 4095
"""XLA on CPU fuses a conversion into a product with a vector of less than 16 kB in float32."""


def _one_row(eqn: str, x: Array, weight: Array) -> Float32[Array, "..."]:
    inputs, axes = activation_axes(eqn), weight_axes(eqn)
    outputs = (weight.shape[axes.index(axis)] for axis in result_axes(eqn))
    shape = (*x.shape[: x.ndim - len(inputs)], *outputs)
    row = x.reshape(x.shape[x.ndim - len(inputs) :])
    if row.size <= LONGEST_ROW and axes.endswith(inputs):
        # The constraint keeps the change of shape apart from the transpose in the product: joined,
        # they would be done to the whole weight.
        rows_first = Layout(major_to_minor=(0, 1))
        matrix = with_layout_constraint(weight.reshape(-1, row.size), rows_first)
        return _matrix_times_row(matrix, row.reshape(-1)).reshape(shape)
    # A product of bfloat16 with a single row converts the weight first, with two it does not.
    copies = 2 if x.dtype.itemsize == 2 else 1
    rows = jnp.broadcast_to(row, (copies, *row.shape))
    return _in_stored_order(eqn, rows, weight.astype(x.dtype))[0].reshape(shape)


def _matrix_times_row(
    matrix: Shaped[Array, "outputs inputs"], row: Float[Array, " inputs"]
) -> Float32[Array, " outputs"]:
    """Reads the matrix once, as it is stored; only what is in a register is ever converted.

    XLA on CPU fuses the conversion of a matrix into its product with a vector, unless a pass that
    knows default layouts only has made the vector a matrix of one column. So the matrix appears by
    its transpose, in the layout that makes this the same bytes. And it is tied to the row: the
    conversion of a weight, alike in every step, would be moved out of a loop, to be kept in memory.
    """
    matrix, row = jax.lax.optimization_barrier((matrix, row))
    columns = with_layout_constraint(matrix.T, Layout(major_to_minor=(1, 0)))
    return jnp.dot(vector(row), columns.astype(jnp.float32))


def vector(row: Float[Array, " inputs"]) -> Float32[Array, " inputs"]:
    """Numbers one after the other. Were they several heads before, a product into which XLA on CPU
    fuses the change of shape takes ten times as long.
    """
    return with_layout_constraint(row.astype(jnp.float32), Layout(major_to_minor=(0,)))
