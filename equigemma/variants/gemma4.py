"""Gemma 4, text: small models with a per-layer embedding, large ones, and a mixture of experts.

New since Gemma 3n: one residual stream again, times a learned number after each layer; heads twice
as large in global layers, of which a quarter is rotated; logits are soft-capped. In the small
models the last layers attend to the keys and values of the last local or global layer before them;
in the E2B those layers have feed-forwards twice as wide. In the large ones, keys and values of
global layers come from one projection; where they read images, tokens of one attend to each other
in local layers, and back only in global ones. The 26B-A4B has 128 experts beside a dense
feed-forward; a token passes 8 of them.

The 12B is the text part of a model that DeepMind's package does not have; its sizes are those of
the checkpoint that `transformers` loads.
"""

from dataclasses import replace

from equigemma.config import (
    AttentionConfig,
    DensePlusMoEConfig,
    FeedForwardConfig,
    KeyIsValueConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    OwnKVConfig,
    PerLayerConfig,
    RopeConfig,
    SharedKVConfig,
)


_NORM = NormConfig(offset=0.0)


def _local(
    heads: int,
    kv: OwnKVConfig | SharedKVConfig,
    window: int,
    ffw: FeedForwardConfig | DensePlusMoEConfig,
) -> LayerConfig:
    return LayerConfig(
        attention=AttentionConfig(
            heads=heads,
            head_dim=256,
            kv=kv,
            rope=RopeConfig(theta=10_000.0),
            query_scale=1.0,
            window=window,
            qk_norm=_NORM,
            v_norm=NormConfig(offset=None),
        ),
        ffw=ffw,
        pre_norm=_NORM,
        post_norm=_NORM,
        skip_scale="learned",
    )


def _global(local: LayerConfig, kv: OwnKVConfig | KeyIsValueConfig | SharedKVConfig) -> LayerConfig:
    rope = RopeConfig(theta=1_000_000.0, proportion=0.25)
    attention = replace(local.attention, head_dim=512, kv=kv, window=None, rope=rope)
    return replace(local, attention=attention)


def _seeing_images(local: LayerConfig) -> LayerConfig:
    return replace(
        local, attention=replace(local.attention, mask_kind="causal_bidirectional_images")
    )


def _model(
    width: int, layers: tuple[LayerConfig, ...], per_layer: PerLayerConfig | None = None
) -> ModelConfig:
    return ModelConfig(
        vocab=262_144,
        width=width,
        layers=layers,
        final_norm=_NORM,
        final_softcap=30.0,
        per_layer=per_layer,
    )


def _small(
    width: int, kv_heads: int, locals_: int, owning: int, sharing: int, sharing_hidden: int
) -> ModelConfig:
    """`owning` and `sharing` count periods of `locals_` local layers and a global one."""
    own = OwnKVConfig(heads=kv_heads)
    local = _local(8, own, 512, FeedForwardConfig(hidden_dim=4 * width))
    own_period = (local,) * locals_ + (_global(local, own),)
    last = owning * len(own_period) - 1
    # The published trees have projections also where nothing reads them.
    sharer = _local(
        8,
        SharedKVConfig(layer=last - 1, unused=own),
        512,
        FeedForwardConfig(hidden_dim=sharing_hidden),
    )
    sharing_period = (sharer,) * locals_ + (
        _global(sharer, SharedKVConfig(layer=last, unused=own)),
    )
    return _model(
        width,
        own_period * owning + sharing_period * sharing,
        PerLayerConfig(vocab=262_144, dim=256),
    )


def _large(
    width: int,
    layers: int,
    heads: tuple[int, int, int],
    ffw: FeedForwardConfig | DensePlusMoEConfig,
) -> ModelConfig:
    """`heads`: of queries, and of keys in local and in global layers."""
    local = _local(heads[0], OwnKVConfig(heads=heads[1]), 1024, ffw)
    period = (_seeing_images(local),) * 5 + (_global(local, KeyIsValueConfig(heads=heads[2])),)
    return _model(width, period * (layers // 6))


VARIANTS = {
    "gemma4-e2b": _small(1536, kv_heads=1, locals_=4, owning=3, sharing=4, sharing_hidden=12_288),
    "gemma4-e4b": _small(2560, kv_heads=2, locals_=5, owning=4, sharing=3, sharing_hidden=10_240),
    "gemma4-12b": _large(3840, 48, (16, 8, 1), FeedForwardConfig(hidden_dim=15_360)),
    "gemma4-26b-a4b": _large(
        2816,
        30,
        (16, 8, 2),
        DensePlusMoEConfig(
            dense=FeedForwardConfig(hidden_dim=2112),
            moe=MoEConfig(num_experts=128, num_experts_per_token=8, hidden_dim=704),
        ),
    ),
    "gemma4-31b": _large(5376, 60, (32, 16, 4), FeedForwardConfig(hidden_dim=21_504)),
}
