"""Gemma 2 (arXiv:2408.00118): every other layer sees a window of 4096 keys.

New since Gemma 1: local and global layers alternate, grouped queries everywhere, a norm after each
sub-layer, and soft-caps on attention logits (50) and on the output (30). The 27B scales its queries
by width per head instead of head size.
"""

from dataclasses import replace

from equigemma.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
    OwnKVConfig,
    RopeConfig,
)


def _model(
    width: int, layers: int, attention: AttentionConfig, ffw: FeedForwardConfig
) -> ModelConfig:
    global_ = LayerConfig(attention=attention, ffw=ffw, post_norm=NormConfig())
    local = replace(global_, attention=replace(attention, window=4096))
    return ModelConfig(
        vocab=256_128, width=width, layers=((local, global_) * layers)[:layers], final_softcap=30.0
    )


def _attention(heads: int, kv_heads: int, head_dim: int, query_scale: float) -> AttentionConfig:
    return AttentionConfig(
        heads=heads,
        head_dim=head_dim,
        kv=OwnKVConfig(heads=kv_heads),
        rope=RopeConfig(),
        query_scale=query_scale,
        softcap=50.0,
    )


VARIANTS = {
    "gemma2-2b": _model(
        2304,
        26,
        _attention(8, 4, 256, 256**-0.5),
        FeedForwardConfig(hidden_dim=9216, gate_axes="CDF"),
    ),
    "gemma2-9b": _model(
        3584, 42, _attention(16, 8, 256, 256**-0.5), FeedForwardConfig(hidden_dim=14_336)
    ),
    "gemma2-27b": _model(
        4608,
        46,
        _attention(32, 16, 128, (4608 // 32) ** -0.5),
        FeedForwardConfig(hidden_dim=36_864),
    ),
}
