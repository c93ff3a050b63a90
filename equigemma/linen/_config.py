"""A `ModelConfig` under the names of DeepMind's `TransformerConfig`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from equigemma.config import (
    AltUpConfig,
    AttentionConfig,
    DensePlusMoEConfig,
    FeedForwardConfig,
    KeyIsValueConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    SharedKVConfig,
)
from equigemma.linen._cache import CacheDict, init_cache
from equigemma.linen._info import AttentionType, ShimInput, ShimVision


@dataclass(frozen=True)
class ShimConfig:
    """A `ModelConfig` with the names that samplers and trainers look for.

    The properties are those of DeepMind's configs of all generations. Where layers differ, the
    first local one counts, or the first one if all are global. For a part that the model does not
    have, they are None, 0 or False.
    """

    model: ModelConfig

    @property
    def num_embed(self) -> int:
        """Size of the vocabulary."""
        return self.model.vocab

    @property
    def embed_dim(self) -> int:
        """Width of the residual stream."""
        return self.model.width

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.model.layers)

    @property
    def hidden_dim(self) -> int:
        """Hidden size of the feed-forward layers; beside experts, of the dense one."""
        return self._dense.hidden_dim

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self._attention.heads

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self._attention.head_dim

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads."""
        return self.model.kv_heads(self.model.layers.index(self._first))

    @property
    def num_global_kv_heads(self) -> int | None:
        """Key/value heads of global layers; None if local ones have as many."""
        heads = self._of_global(lambda index, _: self.model.kv_heads(index))
        return None if heads == self.num_kv_heads else heads

    @property
    def global_key_size(self) -> int | None:
        """Size of a head in global layers; None if it is that of local ones."""
        size = self._of_global(lambda _, attention: attention.head_dim)
        return None if size == self.head_dim else size

    @property
    def k_eq_v_global(self) -> bool:
        """Whether global layers project keys and values with one weight."""
        return bool(
            self._of_global(lambda _, attention: isinstance(attention.kv, KeyIsValueConfig))
        )

    @property
    def attention_types(self) -> tuple[AttentionType, ...]:
        """Whether each layer is global or local."""
        return tuple(
            AttentionType.GLOBAL if layer.attention.window is None else AttentionType.LOCAL_SLIDING
            for layer in self.model.layers
        )

    @property
    def sliding_window_size(self) -> int | None:
        """Keys that a query of a local layer attends to; None if all layers are global."""
        return self._attention.window

    @property
    def attn_logits_soft_cap(self) -> float | None:
        """Soft cap of attention logits."""
        return self._attention.softcap

    @property
    def final_logit_softcap(self) -> float | None:
        """Soft cap of the logits."""
        return self.model.final_softcap

    def query_pre_attn_scalar(self) -> float:
        """The factor of queries."""
        return self._attention.query_scale

    @property
    def use_post_attn_norm(self) -> bool:
        """Whether the output of attention is normalised."""
        return self._first.post_norm is not None

    @property
    def use_post_ffw_norm(self) -> bool:
        """Whether the output of the feed-forward is normalised."""
        return self._first.post_norm is not None

    @property
    def use_qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self._attention.qk_norm is not None

    @property
    def qk_norm_with_scale(self) -> bool:
        """Whether the norms of queries and keys have a learned scale."""
        norm = self._attention.qk_norm
        return norm is not None and norm.offset is not None

    @property
    def use_value_norm(self) -> bool:
        """Whether values are normalised."""
        return self._attention.v_norm is not None

    @property
    def scale_plus_one(self) -> bool:
        """Whether a stored scale of a norm is its distance from 1."""
        return self._first.pre_norm.offset == 1.0

    @property
    def transpose_gating_einsum(self) -> bool:
        """Whether the gate's weight is stored with the hidden axis before the model's."""
        return self._dense.gate_axes == "CFD"

    @property
    def local_base_frequency(self) -> int:
        """Base of the RoPE wavelengths in local layers."""
        return int(self._attention.rope.theta)

    @property
    def global_base_frequency(self) -> int:
        """Base of the RoPE wavelengths in global layers."""
        return int(self._of_global(lambda _, attention: attention.rope.theta) or 10_000)

    @property
    def local_scale_factor(self) -> float:
        """The divisor of positions in local layers."""
        return self._attention.rope.scale

    @property
    def global_scale_factor(self) -> float:
        """The divisor of positions in global layers."""
        return self._of_global(lambda _, attention: attention.rope.scale) or 1.0

    @property
    def local_rope_proportion(self) -> float:
        """Share of a head that is rotated in local layers."""
        return self._attention.rope.proportion

    @property
    def global_rope_proportion(self) -> float:
        """Share of a head that is rotated in global layers."""
        return self._of_global(lambda _, attention: attention.rope.proportion) or 1.0

    @property
    def per_layer_input_dim(self) -> int:
        """Width of the per-layer embedding."""
        return 0 if self.model.per_layer is None else self.model.per_layer.dim

    @property
    def override_kv_shared_ffw_hidden(self) -> int | None:
        """Hidden size of the feed-forward in layers without keys of their own, where it differs."""
        sharing = (
            _dense(layer).hidden_dim
            for layer in self.model.layers
            if isinstance(layer.attention.kv, SharedKVConfig)
        )
        hidden = next(sharing, self.hidden_dim)
        return None if hidden == self.hidden_dim else hidden

    @property
    def use_altup(self) -> bool:
        """Whether there are parallel residual streams."""
        return self._altup is not None

    @property
    def use_laurel(self) -> bool:
        """Whether there is a low-rank path beside attention."""
        return self._altup is not None

    @property
    def num_altup_inputs(self) -> int:
        """Number of residual streams."""
        return self._altup.streams if self._altup else 1

    @property
    def laurel_rank(self) -> int:
        """Rank of the path beside attention."""
        return self._altup.laurel_rank if self._altup else 0

    @property
    def altup_coef_clip(self) -> float | None:
        """Bound of the mixing coefficients of parallel streams."""
        return self._altup.clip if self._altup else None

    @property
    def enable_moe(self) -> bool:
        """Whether there are experts."""
        return self._moe is not None

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self._moe.num_experts if self._moe else 0

    @property
    def top_k_experts(self) -> int:
        """Number of experts that a token passes."""
        return self._moe.num_experts_per_token if self._moe else 0

    @property
    def expert_dim(self) -> int:
        """Hidden size of an expert."""
        return self._moe.hidden_dim if self._moe else 0

    @property
    def moe_dense_hidden_dim(self) -> int:
        """Hidden size of the dense feed-forward beside experts."""
        return self.hidden_dim if self.enable_moe else 0

    @property
    def audio_encoder(self) -> None:
        """None: audio is not supported."""

    @property
    def vision_encoder(self) -> ShimVision | None:
        """The dimensions of the vision encoder; None if the model reads text only."""
        vision = self.model.vision
        return None if vision is None else ShimVision.of(vision)

    @property
    def input_config(self) -> ShimInput:
        """Text, and images where there is a vision tower."""
        vision = self.model.vision
        if vision is None:
            return ShimInput()
        return ShimInput(support_images=True, num_tokens_per_image=vision.num_soft_tokens)

    def init_cache(
        self,
        batch_size: int,
        dtype: object = jnp.bfloat16,
        *,
        cache_length: int,
        sharding: object = None,
    ) -> CacheDict:
        """An empty cache, see `Transformer.init_cache`."""
        return init_cache(
            self.model,
            batch_size=batch_size,
            dtype=dtype,
            cache_length=cache_length,
            sharding=sharding,
        )

    @property
    def _first(self) -> LayerConfig:
        layers = self.model.layers
        return next((layer for layer in layers if layer.attention.window), layers[0])

    @property
    def _attention(self) -> AttentionConfig:
        return self._first.attention

    @property
    def _dense(self) -> FeedForwardConfig:
        return _dense(self._first)

    @property
    def _moe(self) -> MoEConfig | None:
        ffw = self._first.ffw
        return ffw.moe if isinstance(ffw, DensePlusMoEConfig) else None

    @property
    def _altup(self) -> AltUpConfig | None:
        stream = self.model.stream
        return stream if isinstance(stream, AltUpConfig) else None

    def _of_global(self, value: Callable[[int, AttentionConfig], Any]):
        """`value(index, attention)` of the first global layer; None if all are local."""
        for index, layer in enumerate(self.model.layers):
            if layer.attention.window is None:
                return value(index, layer.attention)
        return None


def _dense(layer: LayerConfig) -> FeedForwardConfig:
    return layer.ffw.dense if isinstance(layer.ffw, DensePlusMoEConfig) else layer.ffw
