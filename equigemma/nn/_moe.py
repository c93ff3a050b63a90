"""A mixture of experts: a router that chooses, and experts that compute only what was chosen.

Rows are sorted by expert, so that those of one expert are multiplied together (`by_expert`). At
decode a step reads the weights of the chosen experts alone.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import geglu, widened
from equigemma._typing import Array, Float, Int, PRNGKeyArray, typed
from equigemma.config import (
    DensePlusMoEConfig,
    FeedForwardConfig,
    LayerConfig,
    MoEConfig,
    NormConfig,
)
from equigemma.nn._einsum import AbstractEinsum, Einsum, by_expert
from equigemma.nn._ffw import GatedFeedForward
from equigemma.nn._norm import RMSNorm, normed, optional_norm
from equigemma.nn._summary import shallow_repr, summary


class Router(eqx.Module):
    """The router: top-k experts of each token and their weights, in float32 or wider.

    **Source:** gemma `gm/nn/gemma4/_moe.py::MoE`.
    """

    norm: RMSNorm
    scale: Float[Array, " D"]
    logits: AbstractEinsum
    expert_scale: Float[Array, " E"]
    chosen: int = eqx.field(static=True)

    def __init__(
        self, width: int, config: MoEConfig, epsilon: float, *, key: PRNGKeyArray, dtype: jnp.dtype
    ):
        self.norm = RMSNorm(width, NormConfig(epsilon=epsilon, offset=None), dtype=dtype)
        self.scale = jnp.ones(width, dtype)
        self.logits = Einsum("...D,DE->...E", (width, config.num_experts), key=key, dtype=dtype)
        self.expert_scale = jnp.ones(config.num_experts, dtype)
        self.chosen = config.num_experts_per_token

    @typed
    def __call__(self, x: Float[Array, "*B D"]) -> tuple[Int[Array, "*B X"], Float[Array, "*B X"]]:
        """Chooses the experts with the largest logits.

        **Arguments:** `x`: the stream itself: the norm here is the only one.

        **Returns:** numbers of experts, and the weight of each: shares that add up to 1, times the
        scale of each expert, in float32 or wider.
        """
        with jax.named_scope("router"):
            wide = self.norm(widened(x)) * x.shape[-1] ** -0.5
            wide = wide * jnp.broadcast_to(self.scale.astype(wide.dtype), x.shape)
            logits, chosen = jax.lax.top_k(self.logits(wide), self.chosen)
            scale = self.expert_scale.astype(wide.dtype)[chosen]
            return chosen, jax.nn.softmax(logits, axis=-1) * scale


class Experts(eqx.Module):
    """Gated feed-forwards that share no weights.

    Every array of both projections has E as its first axis.

    **Source:** Shazeer et al. 2017, arXiv:1701.06538; gemma `gm/nn/gemma4/_moe.py::MoE`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    gate: AbstractEinsum
    down: AbstractEinsum

    def __init__(self, width: int, config: MoEConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        gate_key, down_key = jax.random.split(key)
        experts, hidden = config.num_experts, config.hidden_dim
        self.gate = Einsum(
            "...ED,ECFD->...ECF", (experts, 2, hidden, width), key=gate_key, dtype=dtype
        )
        self.down = Einsum("...EF,EFD->...ED", (experts, hidden, width), key=down_key, dtype=dtype)

    @typed
    def __call__(
        self,
        x: Float[Array, "*B D"],
        chosen: Int[Array, "*B X"],
        weights: Float[Array, "*B X"],
    ) -> Float[Array, "*B D"]:
        """The weighted sum of what the chosen experts make of each row.

        Added up in float32 or wider.

        **Arguments:**

        - `x`: rows, normalised.
        - `chosen`: numbers of experts for each row.
        - `weights`: of the chosen experts.

        **Returns:** the sum, in the dtype of `x`.
        """
        with jax.named_scope("experts"):
            rows, choices = x.reshape(-1, x.shape[-1]), chosen.shape[-1]
            order = jnp.argsort(chosen.reshape(-1))
            expert = chosen.reshape(-1)[order]
            gate_up = by_expert(self.gate, rows[order // choices], expert)
            outputs = by_expert(self.down, geglu(gate_up), expert)[jnp.argsort(order)]
            per_choice = widened(outputs.reshape(len(rows), choices, -1))
            mixed = jnp.einsum("tx,txd->td", weights.reshape(-1, choices), per_choice)
            return mixed.astype(x.dtype).reshape(x.shape)

    def all(self, x: Float[Array, "*B E D"]) -> Float[Array, "*B E D"]:
        """Row e through expert e."""
        return self.down(geglu(self.gate(x)))


class DenseAndExperts(eqx.Module):
    """A dense feed-forward and a mixture of experts, each between its own norms, added.

    **Source:** gemma `gm/nn/gemma4/_modules.py::Block`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    pre_dense_norm: RMSNorm
    dense: GatedFeedForward
    post_dense_norm: RMSNorm | None
    router: Router
    pre_experts_norm: RMSNorm
    experts: Experts
    post_experts_norm: RMSNorm | None

    def __init__(
        self,
        width: int,
        config: DensePlusMoEConfig,
        pre: NormConfig,
        post: NormConfig | None,
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype,
    ):
        dense_key, router_key, experts_key = jax.random.split(key, 3)
        self.pre_dense_norm = RMSNorm(width, pre, dtype=dtype)
        self.dense = GatedFeedForward(width, config.dense, key=dense_key, dtype=dtype)
        self.post_dense_norm = optional_norm(width, post, dtype=dtype)
        self.router = Router(width, config.moe, pre.epsilon, key=router_key, dtype=dtype)
        self.pre_experts_norm = RMSNorm(width, pre, dtype=dtype)
        self.experts = Experts(width, config.moe, key=experts_key, dtype=dtype)
        self.post_experts_norm = optional_norm(width, post, dtype=dtype)

    @typed
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The sum of the dense feed-forward and of the experts.

        **Arguments:** `x`: the stream, not normalised: norms and router here read it as it is.

        **Returns:** what is added to the stream, before the norm after it.
        """
        dense = normed(self.post_dense_norm, self.dense(self.pre_dense_norm(x)))
        mixed = self.experts(self.pre_experts_norm(x), *self.router(x))
        return dense + normed(self.post_experts_norm, mixed)


def make_ffw(
    width: int, config: LayerConfig, *, key: PRNGKeyArray, dtype: jnp.dtype
) -> tuple[RMSNorm | None, GatedFeedForward | DenseAndExperts]:
    """The feed-forward that `config` describes, and the norm before it, if it has none inside."""
    if isinstance(config.ffw, FeedForwardConfig):
        norm = RMSNorm(width, config.pre_norm, dtype=dtype)
        return norm, GatedFeedForward(width, config.ffw, key=key, dtype=dtype)
    pre, post = config.pre_norm, config.post_norm
    return None, DenseAndExperts(width, config.ffw, pre, post, key=key, dtype=dtype)
