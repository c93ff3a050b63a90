"""Rematerialization: activations are computed again in the backward pass, when it is due."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from equigemma._kernels._linear_map import linear_map


Policy = Callable[..., Any]
"""One of `jax.checkpoint_policies`: what is saved."""


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def rematerialized(policy: Policy, block: Any, *arguments: Any) -> Any:
    """`jax.checkpoint(block, policy=policy)(*arguments)`, whose backward pass computes again when
    it is due, and not before.

    What is computed again needs nothing but what was kept. `jax.checkpoint` puts a barrier between,
    but XLA on CPU drops it before it orders the program, and is then free to compute all blocks
    again ahead of the loss, which keeps everything after all. Seen with jax 0.10.2.
    """
    return block(*arguments)


@partial(rematerialized.defjvp, symbolic_zeros=True)
def _derivative(policy: Policy, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    moves = jax.tree.map(lambda tangent: not isinstance(tangent, SymbolicZero), tangents)
    moving, fixed = eqx.partition(primals, moves)
    run = partial(_run, policy)
    floats, pull, others = jax.vjp(partial(run, fixed), moving, has_aux=True)
    tangent = linear_map(
        partial(_forward, run),
        _backward,
        (fixed, moving, pull),
        eqx.filter(tangents, moves),
        like=floats,
    )
    zeros = jax.tree.map(lambda other: np.zeros(other.shape, jax.dtypes.float0), others)
    return eqx.combine(floats, others), eqx.combine(tangent, zeros)


def _run(policy: Policy, fixed: tuple, moving: tuple) -> tuple[Any, Any]:
    """What a block returns, floats and all else apart."""
    run = jax.checkpoint(lambda block, *arguments: block(*arguments), policy=policy)
    return eqx.partition(run(*eqx.combine(moving, fixed)), eqx.is_inexact_array)


def _forward(run: Callable, residuals: tuple, tangent: tuple) -> Any:
    fixed, moving, _ = residuals
    return jax.jvp(partial(run, fixed), (moving,), (tangent,), has_aux=True)[1]


def _backward(residuals: tuple, cotangent: Any) -> tuple:
    pull = residuals[2]
    first = jax.tree.leaves(cotangent)[0].ravel()[0].astype(jnp.float32)
    # Not a constant to XLA, which must allow for infinity; then the step is discarded.
    nothing = 0 * first

    def after_cotangent(kept: Any) -> Any:
        is_float = isinstance(kept, jax.Array) and jnp.issubdtype(kept.dtype, jnp.floating)
        return kept + nothing.astype(kept.dtype) if is_float else kept

    return jax.tree.map(after_cotangent, pull)(cotangent)[0]
