"""Products of a mixture of experts: every row meets the weight of its own expert.

One primitive of JAX in every program. On CPU it becomes the kernel of `few_rows.cc` where experts
have few rows each, which reads the chosen experts alone from the array of all, and else a loop over
blocks of rows; on anything else `jax.lax.ragged_dot_general`. Derivatives are products of the same
kinds, or sums of outer products for each expert (`_expert_outer`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from equigemma._kernels import _native
from equigemma._kernels._always_compiled import always_compiled
from equigemma._kernels._expert_blocks import each_block
from equigemma._kernels._linear_map import linear_map, tangent_or_none
from equigemma._kernels._product import FEW
from equigemma._kernels._ragged import lowering
from equigemma._typing import Array, Float, Int


FEW_EACH = 4
"""Rows of an expert up to which, on average, the time of a product is that of reading weights."""


def few_rows(rows: int, experts: int = 0) -> bool:
    """Whether so many rows, spread over so many experts, take the time of reading weights."""
    return rows <= max(FEW, FEW_EACH * experts)


def read_in_place(
    rows: Array, in_place: Callable[[Array], Array], sliced: Callable[[Array], Array]
) -> Array:
    """`sliced(rows)`, a product with a slice of a stack of weights; on CPU, which would copy the
    slice, `in_place(rows)`, the same as a product of experts.
    """
    return jax.lax.platform_dependent(rows, cpu=in_place, default=sliced)


class ExpertProduct(Protocol):
    """Rows times the weights of one or several experts, in float32 or wider. Static: it is hashed.

    Arrays of weights have an axis for experts in front. Rows are sorted by expert.
    """

    def one(self, x: Array, *weight: Array) -> Array:
        """The product with one expert's weight, without the axis for experts."""
        ...

    def ragged(self, x: Array, expert: Int[Array, " rows"], *weight: Array) -> Array:
        """By `_ragged.ragged_product`."""
        ...

    def has_kernel(self, x: Array, *weight: Array) -> bool:
        """Whether there may be a kernel for these shapes and dtypes, and it is worth a call."""
        ...

    def native(self, x: Array, expert: Int[Array, " rows"], *weight: Array) -> Array:
        """By `_product.call`."""
        ...

    def of_cotangent(self, cotangent: Array, expert: Array, *weight: Array) -> Array:
        """The transpose: from a cotangent, in the dtype of the activation, to one of it."""
        ...

    def of_weight(self, like: Array, x: Array, expert: Array, weight: Any, tangent: Any) -> Array:
        """The tangent of the product for one of the weight; None is a zero."""
        ...


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def expert_product(
    product: ExpertProduct, x: Float[Array, "rows ..."], expert: Int[Array, " rows"], *weight: Array
) -> Float[Array, "rows ..."]:
    """Every row times the weight of its expert; rows are sorted by expert.

    `jax.vmap(product.one)(x, *(stack[expert] for stack in weight))`.
    """
    return expert_product_p.bind(x, expert, *weight, product=product)


@partial(expert_product.defjvp, symbolic_zeros=True)
def _jvp(product: ExpertProduct, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, expert, *weight = primals
    dx, _, *dw = map(tangent_or_none, tangents)
    y, parts = expert_product(product, *primals), []
    if dx is not None:
        maps = partial(_of_x, product), partial(_cotangent_of_x, product, x.dtype)
        parts.append(linear_map(*maps, (expert, *weight), dx, like=y))
    if any(tangent is not None for tangent in dw):
        parts.append(product.of_weight(y, x, expert, tuple(weight), tuple(dw)))
    return y, sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(y)


def _of_x(product: ExpertProduct, residuals: tuple, x: Array) -> Array:
    return expert_product(product, x, *residuals)


def _cotangent_of_x(
    product: ExpertProduct, dtype: jnp.dtype, residuals: tuple, cotangent: Array
) -> Array:
    return product.of_cotangent(cotangent.astype(dtype), *residuals).astype(dtype)


@partial(jax.jit, static_argnames="product")
def _on_its_own(*operands: Array, product: ExpertProduct) -> Array:
    return expert_product_p.bind(*operands, product=product)


def _gathered(x: Array, expert: Array, *weight: Array, product: ExpertProduct) -> Array:
    return jax.vmap(product.one)(x, *(stack[expert] for stack in weight))


def _abstract(*operands: Any, product: ExpertProduct) -> Any:
    (result,) = jax.make_jaxpr(partial(_gathered, product=product))(*operands).out_avals
    return result


def _batch(operands: Sequence, axes: Sequence, *, product: ExpertProduct):
    """Rows of all batches are rows of one; so are experts, if each batch has its own."""
    size = next(o.shape[axis] for o, axis in zip(operands, axes, strict=True) if axis is not None)
    own = any(axis is not None for axis in axes[2:])
    parts = [
        in_front(operand, axis, size) if at < 2 or own else operand
        for at, (operand, axis) in enumerate(zip(operands, axes, strict=True))
    ]
    x, expert, *weight = parts
    shape, x = x.shape[:2], x.reshape(-1, *x.shape[2:])
    if own:
        numbers = expert + weight[0].shape[1] * jnp.arange(size, dtype=expert.dtype)[:, None]
        stacks = (stack.reshape(-1, *stack.shape[2:]) for stack in weight)
        y = expert_product_p.bind(x, numbers.reshape(-1), *stacks, product=product)
    else:
        order = jnp.argsort(expert.reshape(-1))
        y = expert_product_p.bind(x[order], expert.reshape(-1)[order], *weight, product=product)
        y = y[jnp.argsort(order)]
    return y.reshape(*shape, *y.shape[1:]), 0


def in_front(operand: Array, axis: int | None, size: int) -> Array:
    """An operand of a batching rule with the batch as its first axis, also if it had none."""
    if axis is None:
        return jnp.broadcast_to(operand, (size, *operand.shape))
    return jnp.moveaxis(operand, axis, 0)


def _on_cpu(ctx: mlir.LoweringRuleContext, *operands: Any, product: ExpertProduct):
    """The kernel, but not in what may run on another machine or is divided between devices."""

    def compute(x: Array, expert: Array, *weight: Array) -> Array:
        if (
            here
            and few_rows(len(x), len(weight[0]))
            and product.has_kernel(x, *weight)
            and _native.calls()
        ):
            return product.native(x, expert, *weight)
        return each_block(product.one, x, expert, *weight)

    module = ctx.module_context
    exported = module.lowering_parameters.for_export
    here = not exported and getattr(module.axis_context, "num_devices", 1) == 1
    return mlir.lower_fun(compute, multiple_results=False)(ctx, *operands)


def _elsewhere(*operands: Array, product: ExpertProduct) -> Array:
    return product.ragged(*operands)


expert_product_p = Primitive("expert_product")
expert_product_p.def_impl(always_compiled(_on_its_own))
expert_product_p.def_abstract_eval(_abstract)
mlir.register_lowering(expert_product_p, _on_cpu, platform="cpu")
mlir.register_lowering(expert_product_p, lowering(_elsewhere))
batching.primitive_batchers[expert_product_p] = _batch
