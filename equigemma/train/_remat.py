"""Rematerialization (gradient checkpointing): activations are recomputed rather than kept."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from equigemma._kernels import linear_map
from equigemma.nn import Transformer
from equigemma.nn._block import AbstractBlock
from equigemma.nn._stack import Stacked
from equigemma.train._checks import check_model


Policy = Literal["nothing", "dots_no_batch", "dots"]

POLICIES: dict[str, Callable[..., Any]] = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}


class RematBlock(AbstractBlock):
    """A block of which only some intermediates are saved for the backward pass."""

    block: AbstractBlock
    policy: Policy = eqx.field(static=True)

    def __call__(self, x, queries, turn, cache=None, vector=None) -> Any:
        """What the block returns."""
        return _rematerialized(self.policy, self.block, x, queries, turn, cache, vector)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rematerialized(policy: Policy, block: AbstractBlock, *arguments: Any) -> Any:
    """`block(*arguments)`, whose backward pass computes again when it is due, and not before.

    What is computed again needs nothing but what was kept. `jax.checkpoint` puts a barrier between,
    but XLA on CPU drops it before it orders the program, and is then free to compute all blocks
    again ahead of the loss, which keeps everything after all.
    """
    return block(*arguments)


@partial(_rematerialized.defjvp, symbolic_zeros=True)
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
    run = jax.checkpoint(lambda block, *arguments: block(*arguments), policy=POLICIES[policy])
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


def check_policy(name: str, policy: Any) -> None:
    """**Raises:** `ValueError` if there is no such policy."""
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(f"`{name}` must be one of {', '.join(POLICIES)}; got {policy!r}.")


def remat(model: Transformer, *, policy: Policy = "nothing") -> Transformer:
    """The model with every block rematerialized in the backward pass, but for what `policy` saves.

    The result computes the same, also its gradients; it is for training only, as the paths of its
    weights are longer. Inside a loss it need not be kept: `loss(remat(model), batch)`.

    **Arguments:** `policy`: which intermediates are saved besides the residual stream between
    blocks, by the names of `jax.checkpoint_policies`: `"nothing"`; `"dots_no_batch"`, the results
    of all products with weights; `"dots"`, the attention logits too.

    **Raises:** `ValueError` if there is no such policy.

    **Source:** Chen et al. 2016, arXiv:1604.06174; `jax.checkpoint_policies`.
    """
    check_model(model)
    check_policy("policy", policy)
    layers = model.layers
    if isinstance(layers, Stacked):
        wrapped = layers.map(partial(RematBlock, policy=policy))
    else:
        wrapped = tuple(RematBlock(layer, policy) for layer in layers)
    return eqx.tree_at(lambda m: m.layers, model, wrapped)
