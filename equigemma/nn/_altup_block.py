"""One layer on parallel streams: it computes the first, and moves the others along."""

import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, PRNGKeyArray, typed
from equigemma.config import AltUpConfig, LayerConfig, PerLayerConfig
from equigemma.nn._altup import AltUp
from equigemma.nn._attention import Attention, SequenceInfo
from equigemma.nn._block import AbstractBlock
from equigemma.nn._cache import AbstractKVCache
from equigemma.nn._ffw import GatedFeedForward
from equigemma.nn._laurel import Laurel
from equigemma.nn._moe import DenseAndExperts, make_ffw
from equigemma.nn._norm import RMSNorm, normed, optional_norm
from equigemma.nn._per_layer import PerLayerGate
from equigemma.nn._rope import SinCos
from equigemma.nn._shared_kv import SharedKVAttention, make_attention
from equigemma.nn._tap import Tap


class AltUpBlock(AbstractBlock):
    """Predicts all streams, computes the first with attention and feed-forward, corrects them all.

    A low-rank path runs beside attention; a per-layer vector is added to all streams but the first.

    **Source:** gemma `gm/nn/gemma3n/_modules.py::Block`.
    """

    alternation: AltUp
    pre_attention_norm: RMSNorm
    attention: Attention | SharedKVAttention
    post_attention_norm: RMSNorm | None
    laurel: Laurel
    resid_mid: Tap
    pre_ffw_norm: RMSNorm | None
    ffw: GatedFeedForward | DenseAndExperts
    post_ffw_norm: RMSNorm | None
    per_layer_gate: PerLayerGate | None

    def __init__(
        self,
        width: int,
        config: LayerConfig,
        stream: AltUpConfig,
        per_layer: PerLayerConfig | None = None,
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype,
    ):
        altup_key, attention_key, laurel_key, ffw_key, gate_key = jax.random.split(key, 5)
        pre, post = config.pre_norm, config.post_norm
        self.alternation = AltUp(width, stream, pre, key=altup_key, dtype=dtype)
        self.pre_attention_norm = RMSNorm(width, pre, dtype=dtype)
        self.attention = make_attention(width, config.attention, key=attention_key, dtype=dtype)
        self.post_attention_norm = optional_norm(width, post, dtype=dtype)
        self.laurel = Laurel(width, stream.laurel_rank, pre, key=laurel_key, dtype=dtype)
        self.resid_mid = Tap()
        self.pre_ffw_norm, self.ffw = make_ffw(width, config, key=ffw_key, dtype=dtype)
        self.post_ffw_norm = optional_norm(width, post, dtype=dtype)
        self.per_layer_gate = (
            None if per_layer is None else PerLayerGate(width, per_layer, key=gate_key, dtype=dtype)
        )

    @typed
    def __call__(
        self,
        x: Float[Array, "A *B L D"],
        sequence: SequenceInfo,
        rope: SinCos,
        cache: AbstractKVCache | None = None,
        per_layer_input: Float[Array, "*B L P"] | None = None,
    ) -> tuple[Float[Array, "A *B L D"], AbstractKVCache | None]:
        predicted = self.alternation.predict(x)
        first = predicted[0]
        read = self.pre_attention_norm(first)
        update, cache = self.attention(read, sequence, rope, cache)
        first = first + normed(self.post_attention_norm, update) + self.laurel(read)
        first = self.resid_mid(first * jnp.asarray(2**-0.5, first.dtype))
        first = first + normed(self.post_ffw_norm, self.ffw(normed(self.pre_ffw_norm, first)))
        x = self.alternation.correct(predicted, first)
        if self.per_layer_gate is not None and per_layer_input is not None:
            update = self.per_layer_gate(self.alternation.scaled(x[0]), per_layer_input)
            x = x.at[1:].add(update[None])
        return x, cache
