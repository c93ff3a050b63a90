"""The one place where a weight meets an activation.

A projection is a weight with the equation it is used in. Everything that changes how weights are
held (adapters, 8-bit forms, fused layouts) is another `AbstractEinsum`; no module above asks which.
"""

import math
from abc import abstractmethod
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from equigemma._typing import Array, Float, Float32, PRNGKeyArray, Shaped


class AbstractEinsum(eqx.Module):
    """A linear map on the last axes of an activation, given by an einsum equation.

    `eqn` reads `"...D,NDH->...NH"`: activation, weight, result, in the letters of the axis legend.
    """

    eqn: eqx.AbstractVar[str]

    @abstractmethod
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The map applied to `x`, in the dtype of `x`."""


class Einsum(AbstractEinsum):
    """A dense weight.

    Products accumulate in float32 and are rounded once to the dtype of the activation.
    """

    weight: Float[Array, "..."]
    eqn: str = eqx.field(static=True)

    def __init__(self, eqn: str, shape: tuple[int, ...], *, key: PRNGKeyArray, dtype: jnp.dtype):
        contracted = set(weight_axes(eqn)) - set(result_axes(eqn))
        fan_in = math.prod(
            size for axis, size in zip(weight_axes(eqn), shape, strict=True) if axis in contracted
        )
        self.weight = jax.random.normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)
        self.eqn = eqn

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return contract(self.eqn, x, self.weight)


def activation_axes(eqn: str) -> str:
    """The letters of the activation without its batch: `"...D,NDH->...NH"` gives `"D"`."""
    return eqn.split(",")[0].removeprefix("...")


def weight_axes(eqn: str) -> str:
    """The letters of the weight: `"...D,NDH->...NH"` gives `"NDH"`."""
    return eqn.split("->")[0].split(",")[1]


def result_axes(eqn: str) -> str:
    """The letters of the result without its batch: `"...D,NDH->...NH"` gives `"NH"`."""
    return eqn.split("->")[1].removeprefix("...")


def contract(
    eqn: str, x: Float[Array, "..."], weight: Array, dtype: jnp.dtype | type | None = None
) -> Float[Array, "..."]:
    """`einsum(eqn, x, weight)`, accumulated in float32, in `dtype` (by default that of `x`).

    A weight stored in another dtype, also an integer, is converted; the activation never is.

    Many rows take the time of computing, one row, as in decoding, that of reading the weight, and
    on CPU the two want different programs. One row reads a matrix `[outputs, inputs]` as fast as
    memory gives it, a weight in another layout at half of that or less. Under `vmap` one row is one
    of many, which is slow there: decode a batch along a batch axis.
    """
    inputs = activation_axes(eqn)
    rows = math.prod(x.shape[: x.ndim - len(inputs)])
    if rows == 1 and inputs in weight_axes(eqn) and not set(inputs) & set(result_axes(eqn)):
        product = jax.lax.platform_dependent(
            x, weight, cpu=partial(_one_row, eqn), default=partial(_many_rows, eqn)
        )
    else:
        product = _many_rows(eqn, x, weight)
    return product.astype(x.dtype if dtype is None else dtype)


def _many_rows(eqn: str, x: Array, weight: Array) -> Float32[Array, "..."]:
    return jnp.einsum(eqn, x, weight.astype(x.dtype), preferred_element_type=jnp.float32)


LONGEST_ROW = 4095
"""XLA on CPU fuses a conversion into a product with a vector of less than 16 kB in float32."""


def _one_row(eqn: str, x: Array, weight: Array) -> Float32[Array, "..."]:
    shape = jax.eval_shape(partial(_many_rows, eqn), x, weight).shape
    row = x.reshape(-1)
    outputs_last = not weight_axes(eqn).endswith(activation_axes(eqn))
    if weight.ndim == 2 and row.size <= LONGEST_ROW and not outputs_last:
        return _matrix_times_row(weight, row).reshape(shape)
    if outputs_last:
        # One product for each index of the outer axes: a single one would transpose the weight.
        outer = weight_axes(eqn).index(activation_axes(eqn))
        matrices = weight.reshape(math.prod(weight.shape[:outer]), row.size, -1)
    else:
        matrices = weight.reshape(1, -1, row.size)
    # A product of bfloat16 with a single row converts the weight first, with two it does not.
    copies = 2 if x.dtype.itemsize == 2 else 1
    rows = jnp.broadcast_to(row, (len(matrices), copies, row.size))
    contracted = (2,), (1 if outputs_last else 2,)
    product = jax.lax.dot_general(
        rows,
        matrices.astype(x.dtype),
        (contracted, ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )
    return product[:, 0].reshape(shape)


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
    return jnp.dot(row.astype(jnp.float32), columns.astype(jnp.float32))
