"""One layer: attention and feed-forward, each between norms, added to the residual stream."""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, PRNGKeyArray, typed
from equigemma.config import LayerConfig
from equigemma.nn._attention import Attention, Queries
from equigemma.nn._cache import AbstractKVCache
from equigemma.nn._ffw import GatedFeedForward
from equigemma.nn._norm import RMSNorm
from equigemma.nn._rope import Rotation


class Block(eqx.Module):
    """`x + post(attention(pre(x)))`, then the same with the feed-forward; post-norms are optional.

    **Source:** gemma `gm/nn/_modules.py::Block`.
    """

    pre_attention_norm: RMSNorm
    attention: Attention
    post_attention_norm: RMSNorm | None
    pre_ffw_norm: RMSNorm
    ffw: GatedFeedForward
    post_ffw_norm: RMSNorm | None

    def __init__(self, width: int, config: LayerConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        attention_key, ffw_key = jax.random.split(key)
        pre, post = config.pre_norm, config.post_norm
        self.pre_attention_norm = RMSNorm(width, pre, dtype=dtype)
        self.attention = Attention(width, config.attention, key=attention_key, dtype=dtype)
        self.post_attention_norm = None if post is None else RMSNorm(width, post, dtype=dtype)
        self.pre_ffw_norm = RMSNorm(width, pre, dtype=dtype)
        self.ffw = GatedFeedForward(width, config.ffw, key=ffw_key, dtype=dtype)
        self.post_ffw_norm = None if post is None else RMSNorm(width, post, dtype=dtype)

    @typed
    def __call__(
        self,
        x: Float[Array, "*B L D"],
        queries: Queries,
        turn: Rotation,
        cache: AbstractKVCache | None = None,
    ) -> tuple[Float[Array, "*B L D"], AbstractKVCache | None]:
        """The stream after this layer, and the layer's memory after this call."""
        update, cache = self.attention(self.pre_attention_norm(x), queries, turn, cache)
        if self.post_attention_norm is not None:
            update = self.post_attention_norm(update)
        x = x + update

        update = self.ffw(self.pre_ffw_norm(x))
        if self.post_ffw_norm is not None:
            update = self.post_ffw_norm(update)
        return x + update, cache
