"""Gemma 3n, text: a model inside a model, for small devices.

New since Gemma 3: four residual streams of which layers compute one (AltUp), a low-rank path beside
attention (LAuReL), a per-layer embedding, and feed-forwards of which the first ten keep a twentieth
of their gates. From layer 20 on, layers attend to the keys and values of layer 18, the last local
one before them, or 19, the last global one. Norms scale by what is stored, values are normalised
too, queries are not scaled. The E2B is the E4B without some layers and with half of each
feed-forward.
"""

from dataclasses import replace

from equigemma.config import (
    AltUpConfig,
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
    OwnKVConfig,
    PerLayerConfig,
    RopeConfig,
    SharedKVConfig,
)


_NORM = NormConfig(offset=0.0)
# Of a normal distribution, 95 % lies below this many standard deviations above the mean.
_CUTOFF = 1.6448536269514715


def _shared(layer: LayerConfig, owner: int) -> LayerConfig:
    return replace(layer, attention=replace(layer.attention, kv=SharedKVConfig(layer=owner)))


def _model(layers: int, hidden: int) -> ModelConfig:
    local = LayerConfig(
        attention=AttentionConfig(
            heads=8,
            head_dim=256,
            kv=OwnKVConfig(heads=2),
            rope=RopeConfig(theta=10_000.0),
            query_scale=1.0,
            window=512,
            qk_norm=_NORM,
            v_norm=NormConfig(offset=None),
        ),
        ffw=FeedForwardConfig(hidden_dim=hidden),
        pre_norm=_NORM,
        post_norm=_NORM,
    )
    global_ = replace(
        local,
        attention=replace(local.attention, window=None, rope=RopeConfig(theta=1_000_000.0)),
    )
    own = (local,) * 4 + (global_,)
    sparse = tuple(
        replace(layer, ffw=FeedForwardConfig(hidden_dim=hidden, cutoff=_CUTOFF)) for layer in own
    )
    sharing = (_shared(local, 18),) * 4 + (_shared(global_, 19),)
    return ModelConfig(
        vocab=262_144,
        width=2048,
        layers=sparse * 2 + own * 2 + sharing * (layers // 5 - 4),
        final_norm=_NORM,
        stream=AltUpConfig(streams=4, laurel_rank=64, clip=120.0),
        per_layer=PerLayerConfig(vocab=262_144, dim=256),
    )


VARIANTS = {
    "gemma3n-e2b": _model(layers=30, hidden=8192),
    "gemma3n-e4b": _model(layers=35, hidden=16_384),
}
