"""Configs as values, and every invariant with the sentence that it is refused with."""

from dataclasses import FrozenInstanceError, replace

import pytest
import tiny

from equigemma.config import (
    AltUpConfig,
    AttentionConfig,
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


def attention(**changes) -> AttentionConfig:
    """A valid attention layer with some fields changed."""
    valid = dict(heads=6, head_dim=10, kv=OwnKVConfig(heads=3), rope=RopeConfig(), query_scale=0.5)
    return AttentionConfig(**(valid | changes))


def layer(**changes) -> LayerConfig:
    return LayerConfig(attention=attention(**changes), ffw=FeedForwardConfig(hidden_dim=17))


def model(*layers: LayerConfig, **changes) -> ModelConfig:
    return ModelConfig(**(dict(vocab=31, width=13, layers=layers or (layer(),)) | changes))


OWNER = layer()
SHARING = layer(kv=SharedKVConfig(layer=0))
REFUSED = {
    "NormConfig.epsilon must be positive, got 0.": lambda: NormConfig(epsilon=0),
    "RopeConfig.theta must be positive, got -1.0.": lambda: RopeConfig(theta=-1.0),
    "RopeConfig.scale must be at least 1, got 0.5.": lambda: RopeConfig(scale=0.5),
    "RopeConfig.proportion must lie in (0, 1], got 0.": lambda: RopeConfig(proportion=0),
    "RopeConfig.proportion must lie in (0, 1], got 1.5.": lambda: RopeConfig(proportion=1.5),
    "OwnKVConfig.heads must be positive, got 0.": lambda: OwnKVConfig(heads=0),
    "KeyIsValueConfig.heads must be positive, got 0.": lambda: KeyIsValueConfig(heads=0),
    "AttentionConfig.heads must be positive, got 0.": lambda: attention(heads=0),
    "AttentionConfig.head_dim must be positive, got -2.": lambda: attention(head_dim=-2),
    "AttentionConfig.query_scale must be positive, got 0.": lambda: attention(query_scale=0),
    "AttentionConfig.window must be positive, got 0.": lambda: attention(window=0),
    "AttentionConfig.softcap must be positive, got -30.": lambda: attention(softcap=-30),
    "head_dim must be even, because RoPE rotates pairs; got 7.": (lambda: attention(head_dim=7)),
    "The number of key/value heads must divide the number of query heads; got 4 and 6. "
    "Gemma 3 4B uses 4 and 8.": lambda: attention(kv=OwnKVConfig(heads=4)),
    "qkv_axes='CNDH' stores as many key/value heads as query heads; got OwnKVConfig(heads=3) and 6 "
    "query heads. Use 'NDH,CKDH'.": lambda: attention(qkv_axes="CNDH"),
    "FeedForwardConfig.hidden_dim must be positive, got 0.": lambda: FeedForwardConfig(
        hidden_dim=0
    ),
    "MoEConfig.num_experts must be positive, got 0.": lambda: MoEConfig(
        num_experts=0, num_experts_per_token=1, hidden_dim=7
    ),
    "MoEConfig.num_experts_per_token must be at most num_experts; got 5 of 3.": (
        lambda: MoEConfig(num_experts=3, num_experts_per_token=5, hidden_dim=7)
    ),
    "AltUpConfig.streams must be positive, got 0.": lambda: AltUpConfig(streams=0, laurel_rank=7),
    "AltUpConfig.clip must be positive, got 0.0.": lambda: AltUpConfig(
        streams=3, laurel_rank=7, clip=0.0
    ),
    "PerLayerConfig.dim must be positive, got 0.": lambda: PerLayerConfig(vocab=31, dim=0),
    "ModelConfig.vocab must be positive, got 0.": lambda: model(vocab=0),
    "ModelConfig.width must be positive, got -3.": lambda: model(width=-3),
    "ModelConfig.final_softcap must be positive, got 0.0.": lambda: model(final_softcap=0.0),
    "ModelConfig.layers must hold at least one layer, got none.": (
        lambda: ModelConfig(vocab=31, width=13, layers=())
    ),
    "Layer 0 shares the keys and values of layer 0; the owner must be one of the layers before "
    "it.": lambda: model(SHARING),
    "Layer 1 shares the keys and values of layer -1; the owner must be one of the layers before "
    "it.": lambda: model(OWNER, layer(kv=SharedKVConfig(layer=-1))),
    "Layer 2 shares the keys and values of layer 1, which has none of its own: name their owner, "
    "layer 0.": lambda: model(OWNER, SHARING, layer(kv=SharedKVConfig(layer=1))),
    "Layer 1 shares the keys and values of layer 0, so both need the same window; got 5 and "
    "None.": lambda: model(OWNER, layer(kv=SharedKVConfig(layer=0), window=5)),
    "Layer 1 shares the keys and values of layer 0, so both need the same head_dim; got 14 and "
    "10.": lambda: model(OWNER, layer(kv=SharedKVConfig(layer=0), head_dim=14)),
    "The number of key/value heads must divide the number of query heads; got 3 and 7. Gemma 3 "
    "4B uses 4 and 8.": lambda: model(OWNER, layer(kv=SharedKVConfig(layer=0), heads=7)),
    "Layer 0 has a skip_scale, which goes with one residual stream only; got "
    "stream=AltUpConfig(streams=3, laurel_rank=7, modes=4, clip=None).": (
        lambda: model(
            replace(OWNER, skip_scale="learned"), stream=AltUpConfig(streams=3, laurel_rank=7)
        )
    ),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_with_a_sentence(sentence):
    with pytest.raises(ValueError) as error:
        REFUSED[sentence]()
    assert str(error.value) == sentence


def test_different_rotations_cannot_share_keys():
    turned = layer(kv=SharedKVConfig(layer=0), rope=RopeConfig(theta=7.0))
    with pytest.raises(ValueError, match=r"the same rope; got RopeConfig\(theta=7.0.* and RopeC"):
        model(OWNER, turned)


def test_what_is_allowed_at_the_edges():
    assert attention(window=1, kv=OwnKVConfig(heads=1)).window == 1
    assert attention(kv=OwnKVConfig(heads=6), qkv_axes="CNDH").heads == 6
    assert RopeConfig(proportion=1.0, scale=1.0) == RopeConfig()
    assert (
        MoEConfig(num_experts=3, num_experts_per_token=3, hidden_dim=7).num_experts_per_token == 3
    )


def test_owners_and_their_heads():
    config = model(
        OWNER, SHARING, layer(kv=KeyIsValueConfig(heads=2)), layer(kv=SharedKVConfig(layer=2))
    )
    assert [config.owner(index) for index in range(4)] == [0, 0, 2, 2]
    assert [config.kv_heads(index) for index in range(4)] == [3, 3, 2, 2]


def test_configs_are_frozen_and_hashable():
    with pytest.raises(FrozenInstanceError):
        tiny.GEMMA3.width = 7  # type: ignore[misc]
    assert hash(tiny.GEMMA3) == hash(replace(tiny.GEMMA3))
    assert len({tiny.GEMMA1_MHA, tiny.GEMMA1_MQA, replace(tiny.GEMMA1_MHA)}) == 2


def test_fields_go_by_name():
    with pytest.raises(TypeError, match="positional"):
        OwnKVConfig(3)  # type: ignore[misc]


def test_repr_fits_on_a_line():
    assert repr(tiny.GEMMA2) == (
        "ModelConfig(vocab=31, width=13, final_norm=NormConfig(epsilon=1e-06, offset=1.0), "
        "final_softcap=3.0, lm_head='tied', stream=PlainStreamConfig(), per_layer=None, "
        "vision=None, layers=<2 layers>)"
    )
