"""Products of experts whose weights are floats, or integers that stand for themselves."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from equigemma._kernels._contract import PlainProduct, contract, keeps_order
from equigemma._kernels._equation import activation_axes, result_axes, weight_axes
from equigemma._kernels._expert_outer import expert_outer
from equigemma._kernels._experts import expert_product
from equigemma._kernels._linear_map import linear_map, tangent_or_none
from equigemma._kernels._product import SMALL, call
from equigemma._kernels._ragged import ragged_product
from equigemma._typing import Array, Float, Int, Shaped


def contract_experts(
    eqn: str,
    x: Float[Array, "rows ..."],
    weight: Shaped[Array, "experts ..."],
    expert: Int[Array, " rows"],
    dtype: jnp.dtype | type | None = None,
) -> Float[Array, "rows ..."]:
    """`jax.vmap(partial(jnp.einsum, eqn))(x, weight[expert])`, accumulated in float32 or wider.

    **Arguments:** `eqn`: that of one expert, such as `"...D,CFD->...CF"`. `expert`: which expert
    each row goes to; rows are sorted by it, and a number that no expert has is clipped. `dtype`: of
    the result, by default that of `x`.
    """
    product = expert_product(Dense(eqn), x, jnp.clip(expert, 0, len(weight) - 1), weight)
    return product.astype(x.dtype if dtype is None else dtype)


@dataclass(frozen=True)
class Dense:
    """With weights of floats, or of integers that stand for themselves."""

    eqn: str  # that of one expert

    def one(self, x: Array, weight: Array) -> Array:
        if x.dtype.itemsize > 4:
            return contract(self.eqn, x, weight)
        return PlainProduct(self.eqn, sliced=True)(x, weight)

    def ragged(self, x: Array, expert: Int[Array, " rows"], weight: Array) -> Array:
        (before, inputs, after), outputs = self._sizes(weight)
        stack = self._by_inputs(weight).reshape(len(weight), before, inputs, after)
        product = ragged_product(x.reshape(len(x), inputs), stack, expert)
        return product.reshape(len(x), *outputs)

    def has_kernel(self, x: Array, weight: Array) -> bool:
        known = weight.dtype in (jnp.float32, jnp.bfloat16, jnp.int8) and x.dtype.itemsize <= 4
        return known and keeps_order(self.eqn) and weight[0].size >= SMALL

    def native(self, x: Array, expert: Int[Array, " rows"], weight: Array) -> Array:
        (before, inputs, after), outputs = self._sizes(weight)
        rows, number = x.reshape(len(x), inputs), expert.astype(jnp.int32)
        sizes = dict(outputs=before * after, each=after)
        return call("equigemma_experts", rows, weight, number, **sizes).reshape(len(x), *outputs)

    def of_cotangent(self, cotangent: Array, expert: Array, weight: Array) -> Array:
        return expert_product(Dense(self.transposed()), cotangent, expert, weight)

    def of_weight(self, like: Array, x: Array, expert: Array, weight: Any, tangent: Any) -> Array:
        (weight,), (tangent,) = weight, tangent
        of_outer = partial(_cotangent_of_weight, self, len(weight), weight.dtype)
        return linear_map(partial(_of_weight, self), of_outer, (x, expert), tangent, like=like)

    def outer(self, x: Array, cotangent: Array, expert: Array, experts: int) -> Array:
        """Sums of outer products, along the axes of the weight."""
        inputs, outputs = activation_axes(self.eqn), result_axes(self.eqn)
        first, second, axes = x, cotangent, inputs + outputs
        if weight_axes(self.eqn).endswith(inputs):
            first, second, axes = cotangent, x, outputs + inputs
        one, other = (factor.reshape(len(factor), -1) for factor in (first, second))
        sums = expert_outer(one, other, expert, experts)
        sums = sums.reshape(experts, *first.shape[1:], *second.shape[1:])
        return jnp.einsum(f"...{axes}->...{weight_axes(self.eqn)}", sums)

    def transposed(self) -> str:
        inputs, outputs = activation_axes(self.eqn), result_axes(self.eqn)
        return f"...{outputs},{weight_axes(self.eqn)}->...{inputs}"

    def _by_inputs(self, weight: Array) -> Array:
        """The weight with all inputs one after the other, if they are not."""
        if keeps_order(self.eqn):
            return weight
        order = result_axes(self.eqn) + activation_axes(self.eqn)
        return jnp.einsum(f"...{weight_axes(self.eqn)}->...{order}", weight)

    def _sizes(self, weight: Array) -> tuple[tuple[int, int, int], tuple[int, ...]]:
        """Outputs before the inputs of `_by_inputs`, inputs, outputs after; the result's axes."""
        inputs, outputs, axes = (f(self.eqn) for f in (activation_axes, result_axes, weight_axes))
        size = dict(zip(axes, weight.shape[1:], strict=True))
        first = axes.index(inputs) if keeps_order(self.eqn) else len(outputs)
        parts = outputs[:first], inputs, outputs[first:]
        before, count, after = (math.prod(size[axis] for axis in part) for part in parts)
        return (before, count, after), tuple(size[axis] for axis in outputs)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _outer(product: Dense, experts: int, x: Array, cotangent: Array, expert: Array) -> Array:
    return product.outer(x, cotangent, expert, experts)


@partial(_outer.defjvp, symbolic_zeros=True)
def _outer_jvp(product: Dense, experts: int, primals: tuple, tangents: tuple):
    x, cotangent, expert = primals
    dx, dc, _ = map(tangent_or_none, tangents)
    y, parts = _outer(product, experts, *primals), []
    if dx is not None:
        maps = partial(_outer_of_x, product, experts), partial(_to_x, product, x.dtype)
        parts.append(linear_map(*maps, (cotangent, expert), dx, like=y))
    if dc is not None:
        dtype = cotangent.dtype
        maps = (
            partial(_outer_of_cotangent, product, experts),
            partial(_to_cotangent, product, dtype),
        )
        parts.append(linear_map(*maps, (x, expert), dc, like=y))
    return y, sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(y)


def _of_weight(product: Dense, residuals: tuple, weight: Array) -> Array:
    x, expert = residuals
    return expert_product(product, x, expert, weight)


def _cotangent_of_weight(
    product: Dense, experts: int, dtype: jnp.dtype, residuals: tuple, cotangent: Array
) -> Array:
    x, expert = residuals
    return _outer(product, experts, x, cotangent.astype(x.dtype), expert).astype(dtype)


def _outer_of_x(product: Dense, experts: int, residuals: tuple, x: Array) -> Array:
    cotangent, expert = residuals
    return _outer(product, experts, x, cotangent, expert)


def _outer_of_cotangent(product: Dense, experts: int, residuals: tuple, cotangent: Array) -> Array:
    x, expert = residuals
    return _outer(product, experts, x, cotangent, expert)


def _to_x(product: Dense, dtype: jnp.dtype, residuals: tuple, weight: Array) -> Array:
    cotangent, expert = residuals
    return product.of_cotangent(cotangent, expert, weight).astype(dtype)


def _to_cotangent(product: Dense, dtype: jnp.dtype, residuals: tuple, weight: Array) -> Array:
    x, expert = residuals
    return expert_product(product, x, expert, weight).astype(dtype)
