"""One layer: attention and feed-forward, each between norms, added to the residual stream."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, PRNGKeyArray, typed
from equigemma.config import LayerConfig, PerLayerConfig
from equigemma.nn._attention import Attention, SequenceInfo
from equigemma.nn._cache import AbstractKVCache
from equigemma.nn._ffw import GatedFeedForward
from equigemma.nn._moe import DenseAndExperts, make_ffw
from equigemma.nn._norm import RMSNorm, normed, optional_norm
from equigemma.nn._per_layer import PerLayerGate
from equigemma.nn._rope import SinCos
from equigemma.nn._shared_kv import SharedKVAttention, make_attention
from equigemma.nn._summary import shallow_repr, summary
from equigemma.nn._tap import Tap


class AbstractBlock(eqx.Module):
    """One layer, whatever shape the residual stream has."""

    __pdoc__ = summary
    __repr__ = shallow_repr

    if TYPE_CHECKING:
        # A block of one's own need not have attention; those of every published model do.
        attention: Any = eqx.field(init=False)

    @abstractmethod
    def __call__(
        self,
        x: Float[Array, "..."],
        sequence: SequenceInfo,
        rope: SinCos,
        cache: AbstractKVCache | None = None,
        per_layer_input: Float[Array, "*B L P"] | None = None,
    ) -> tuple[Float[Array, "..."], AbstractKVCache | None]:
        """Applies the layer.

        `per_layer_input` is this layer's part of the per-layer embedding, in models that have one.

        **Arguments:**

        - `x`: the residual stream, `[*B L D]`; with AltUp its parallel streams, `[A *B L D]`.
        - `sequence`: positions and mask of the tokens, which all layers share.
        - `rope`: sine and cosine of each token's angles, see `rope_sin_cos`.
        - `cache`: the layer's own, before this call; None: there is none.
        - `per_layer_input`: this layer's part of the per-layer embedding, in models that have one.

        **Returns:** the stream after this layer, and the layer's KV cache after this call.
        """


class Block(AbstractBlock):
    """`x + post(attention(pre(x)))`, then the same with the feed-forward; post-norms are optional.

    **Source:** gemma `gm/nn/_modules.py::Block`.
    """

    pre_attention_norm: RMSNorm
    attention: Attention | SharedKVAttention
    post_attention_norm: RMSNorm | None
    resid_mid: Tap
    pre_ffw_norm: RMSNorm | None
    ffw: GatedFeedForward | DenseAndExperts
    post_ffw_norm: RMSNorm | None
    per_layer_gate: PerLayerGate | None
    skip_scale: Float[Array, "1"] | None

    def __init__(
        self,
        width: int,
        config: LayerConfig,
        per_layer: PerLayerConfig | None = None,
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype,
    ):
        attention_key, ffw_key = jax.random.split(key)
        pre, post = config.pre_norm, config.post_norm
        self.pre_attention_norm = RMSNorm(width, pre, dtype=dtype)
        self.attention = make_attention(width, config.attention, key=attention_key, dtype=dtype)
        self.post_attention_norm = optional_norm(width, post, dtype=dtype)
        self.resid_mid = Tap()
        self.per_layer_gate = None
        if per_layer is not None:
            ffw_key, gate_key = jax.random.split(ffw_key)
            self.per_layer_gate = PerLayerGate(width, per_layer, key=gate_key, dtype=dtype)
        self.pre_ffw_norm, self.ffw = make_ffw(width, config, key=ffw_key, dtype=dtype)
        self.post_ffw_norm = optional_norm(width, post, dtype=dtype)
        self.skip_scale = None if config.skip_scale is None else jnp.ones(1, dtype)

    @typed
    def __call__(
        self,
        x: Float[Array, "*B L D"],
        sequence: SequenceInfo,
        rope: SinCos,
        cache: AbstractKVCache | None = None,
        per_layer_input: Float[Array, "*B L P"] | None = None,
    ) -> tuple[Float[Array, "*B L D"], AbstractKVCache | None]:
        update, cache = self.attention(self.pre_attention_norm(x), sequence, rope, cache)
        x = self.resid_mid(x + normed(self.post_attention_norm, update))
        x = x + normed(self.post_ffw_norm, self.ffw(normed(self.pre_ffw_norm, x)))
        if self.per_layer_gate is not None and per_layer_input is not None:
            x = x + self.per_layer_gate(x, per_layer_input)
        if self.skip_scale is not None:
            x = x * jnp.broadcast_to(self.skip_scale.astype(x.dtype), x.shape)
        return x, cache
