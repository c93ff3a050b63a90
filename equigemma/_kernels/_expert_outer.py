"""Gradients of the weights of experts: sums of outer products of the rows of each."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from equigemma._kernels._always_compiled import always_compiled
from equigemma._kernels._contract import summed_products
from equigemma._kernels._expert_blocks import summed_over_blocks
from equigemma._kernels._experts import in_front
from equigemma._kernels._precision import wide_dtype
from equigemma._kernels._ragged import lowering, ragged_outer
from equigemma._typing import Array, Float, Int


def expert_outer(
    x: Float[Array, "rows inputs"],
    y: Float[Array, "rows outputs"],
    expert: Int[Array, " rows"],
    experts: int,
) -> Float[Array, "experts inputs outputs"]:
    """The sum of outer products of the rows of each expert, which rows are sorted by.

    `jnp.einsum("re,ri,ro->eio", jax.nn.one_hot(expert, experts), x, y)`, in float32 or wider. It
    is differentiated by who calls it: it is linear in `x` and in `y`.
    """
    return expert_outer_p.bind(x, y, expert, experts=experts)


@partial(jax.jit, static_argnames="experts")
def _on_its_own(*operands: Array, experts: int) -> Array:
    return expert_outer_p.bind(*operands, experts=experts)


def _in_one(x: Array, y: Array, expert: Array, *, experts: int) -> Array:
    wide = wide_dtype(x)
    chosen = jax.nn.one_hot(expert, experts, dtype=wide)
    return jnp.einsum("re,ri,ro->eio", chosen, x.astype(wide), y.astype(wide))


def _abstract(*operands: Any, experts: int) -> Any:
    (result,) = jax.make_jaxpr(partial(_in_one, experts=experts))(*operands).out_avals
    return result


def _batch(operands: Sequence, axes: Sequence, *, experts: int):
    size = next(o.shape[axis] for o, axis in zip(operands, axes, strict=True) if axis is not None)
    x, y, expert = (in_front(*pair, size) for pair in zip(operands, axes, strict=True))
    numbers = expert + experts * jnp.arange(size, dtype=expert.dtype)[:, None]
    flat = (array.reshape(-1, *array.shape[2:]) for array in (x, y, numbers))
    sums = expert_outer_p.bind(*flat, experts=size * experts)
    return sums.reshape(size, experts, *sums.shape[1:]), 0


def _on_cpu(x: Array, y: Array, expert: Array, *, experts: int) -> Array:
    if x.dtype.itemsize > 4:
        return summed_over_blocks(partial(jnp.einsum, "ri,ro->io"), expert, experts, x, y)
    return summed_over_blocks(summed_products, expert, experts, x, y)


def _elsewhere(x: Array, y: Array, expert: Array, *, experts: int) -> Array:
    return ragged_outer(x, y, expert, experts)


expert_outer_p = Primitive("expert_outer")
expert_outer_p.def_impl(always_compiled(_on_its_own))
expert_outer_p.def_abstract_eval(_abstract)
mlir.register_lowering(
    expert_outer_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu"
)
mlir.register_lowering(expert_outer_p, lowering(_elsewhere))
batching.primitive_batchers[expert_outer_p] = _batch
