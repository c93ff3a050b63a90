"""Grouped matrix products: rows, sorted by group, times the matrix of their group."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from equigemma._kernels._precision import wide_dtype
from equigemma._typing import Array, Float, Int, Shaped


def ragged_product(
    x: Float[Array, "rows inputs"],
    stack: Shaped[Array, "groups before inputs after"],
    group: Int[Array, " rows"],
) -> Float[Array, "rows before after"]:
    """`jnp.einsum("ri,raib->rab", x, stack[group])`, accumulated in float32 or wider.

    By `jax.lax.ragged_dot_general`, for which GPU and TPU have kernels. Rows are sorted by group.
    """
    groups, before, _, after = stack.shape
    # A matrix each, where it can be one: kernels know no more axes.
    matrices = stack[:, 0] if before == 1 else stack[..., 0] if after == 1 else stack
    axis = 1 if before == 1 else 2
    products = jax.lax.ragged_dot_general(
        x,
        matrices.astype(x.dtype),
        _counts(group, groups),
        jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (axis,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        ),
        preferred_element_type=wide_dtype(x),
    )
    return products.reshape(len(x), before, after)


def ragged_outer(
    x: Float[Array, "rows inputs"],
    y: Float[Array, "rows outputs"],
    group: Int[Array, " rows"],
    groups: int,
) -> Float[Array, "groups inputs outputs"]:
    """`jnp.einsum("rg,ri,ro->gio", jax.nn.one_hot(group, groups), x, y)`, in float32 or wider."""
    return jax.lax.ragged_dot_general(
        x,
        y,
        _counts(group, groups),
        jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        ),
        preferred_element_type=wide_dtype(x),
    )


def _counts(group: Array, groups: int) -> Int[Array, " groups"]:
    return jnp.bincount(group, length=groups).astype(jnp.int32)


def lowering(function: Callable[..., Array]) -> Callable[..., Any]:
    """The lowering rule of a primitive that `function` computes by these products.

    Where dtypes are not promoted, JAX (0.10.2, 0.12.0.1) refuses to lower a grouped product of half
    precision with a result in float32.
    """
    lower = mlir.lower_fun(function, multiple_results=False)

    def rule(ctx: mlir.LoweringRuleContext, *operands: Any, **parameters: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return lower(ctx, *operands, **parameters)

    return rule
