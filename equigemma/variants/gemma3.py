"""Gemma 3 (arXiv:2503.19786): five local layers, then one global, and so on.

New since Gemma 2: norms on queries and keys instead of soft-caps, short windows (512 or 1024), and
two rotary bases, 10k in local layers and 1M in global ones, there stretched eightfold from the 4B
up. From there on they also read images: tokens of an image attend to each other, those of text to
the past only.

EmbeddingGemma (arXiv:2509.20354) is bidirectional: local layers attend as
far ahead as back, and global ones all. What makes a vector of it is an `Embedder` around it.
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
    SigLIPConfig,
)


def _model(
    width: int,
    layers: int,
    hidden: int,
    heads: tuple[int, int],
    head_dim: int = 256,
    query_scale: float = 256**-0.5,
    window: int = 1024,
    global_rope_scale: float = 8.0,
) -> ModelConfig:
    local = LayerConfig(
        attention=AttentionConfig(
            heads=heads[0],
            head_dim=head_dim,
            kv=OwnKVConfig(heads=heads[1]),
            rope=RopeConfig(theta=10_000.0),
            query_scale=query_scale,
            window=window,
            qk_norm=NormConfig(),
        ),
        ffw=FeedForwardConfig(hidden_dim=hidden),
        post_norm=NormConfig(),
    )
    global_ = replace(
        local,
        attention=replace(
            local.attention,
            window=None,
            rope=RopeConfig(theta=1_000_000.0, scale=global_rope_scale),
        ),
    )
    period = (local,) * 5 + (global_,)
    return ModelConfig(vocab=262_144, width=width, layers=(period * (layers // 6 + 1))[:layers])


def _seeing(text: ModelConfig) -> ModelConfig:
    layers = (
        replace(layer, attention=replace(layer.attention, mask_kind="causal_bidirectional_images"))
        for layer in text.layers
    )
    return replace(text, layers=tuple(layers), vision=SigLIPConfig())


def _looking_ahead(text: ModelConfig) -> ModelConfig:
    layers = (
        replace(layer, attention=replace(layer.attention, mask_kind="bidirectional"))
        for layer in text.layers
    )
    return replace(text, layers=tuple(layers))


VARIANTS = {
    "gemma3-270m": _model(640, 18, 2048, (4, 1), window=512, global_rope_scale=1.0),
    "gemma3-1b": _model(1152, 26, 6912, (4, 1), window=512, global_rope_scale=1.0),
    "gemma3-4b": _seeing(_model(2560, 34, 10_240, (8, 4))),
    "gemma3-12b": _seeing(_model(3840, 48, 15_360, (16, 8))),
    "gemma3-27b": _seeing(
        _model(5376, 62, 21_504, (32, 16), head_dim=128, query_scale=(5376 // 32) ** -0.5)
    ),
    # Files say 512, which is 256 on either side of a token.
    "embeddinggemma-300m": _looking_ahead(
        _model(768, 24, 1152, (3, 1), window=257, global_rope_scale=1.0)
    ),
}
