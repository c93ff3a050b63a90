"""Rematerialization (gradient checkpointing): activations are recomputed rather than kept."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax

from equigemma._kernels import rematerialized
from equigemma._typing import Array, Float
from equigemma.nn import (
    AbstractBlock,
    AbstractKVCache,
    SequenceInfo,
    SinCos,
    Stacked,
    Transformer,
)
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

    def __call__(
        self,
        x: Float[Array, "..."],
        sequence: SequenceInfo,
        rope: SinCos,
        cache: AbstractKVCache | None = None,
        per_layer_input: Float[Array, "*B L P"] | None = None,
    ) -> Any:
        """The block's output."""
        return rematerialized(
            POLICIES[self.policy], self.block, x, sequence, rope, cache, per_layer_input
        )


def check_policy(name: str, policy: Any) -> None:
    """**Raises:** `ValueError` if there is no such policy."""
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(f"`{name}` must be one of {', '.join(POLICIES)}; got {policy!r}.")


def remat(model: Transformer, *, policy: Policy = "nothing") -> Transformer:
    """The model with every block rematerialized in the backward pass, but for what `policy` saves.

    The result computes the same, also its gradients; it is for training only, as the paths of its
    weights are longer. Inside a loss it need not be kept: `loss(remat(model), batch)`.

    **Arguments:**

    - `model`: any `Transformer`, also a stacked one.
    - `policy`: which intermediates are saved besides the residual stream between blocks, by the
      names of `jax.checkpoint_policies`: `"nothing"`; `"dots_no_batch"`, the results of all
      products with weights; `"dots"`, the attention logits too.

    **Returns:** a model whose layers are `RematBlock`s.

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
