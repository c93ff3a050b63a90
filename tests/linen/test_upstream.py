"""Configs of DeepMind's package, as objects and as mappings, and the words for unknown ones."""

import dataclasses
import enum
from typing import Any

import pytest

from equigemma import linen, variants


class AttentionType(enum.Enum):
    """Numbers differ between versions of their package; names do not."""

    GLOBAL = 7
    LOCAL_SLIDING = 9


class Norm(enum.Enum):
    BY_ONE_OVER_SQRT_HEAD_DIM = enum.auto()
    BY_EMBED_DIM_DIV_NUM_HEADS = enum.auto()


LOCAL, GLOBAL = AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Fields and defaults as in `gemma.gm.nn.config.TransformerConfig`."""

    num_embed: int = 262_144
    embed_dim: int = 640
    hidden_dim: int = 2048
    num_heads: int = 4
    head_dim: int = 256
    num_kv_heads: int = 1
    final_logit_softcap: float | None = None
    use_post_attn_norm: bool = True
    use_post_ffw_norm: bool = True
    attention_types: tuple[AttentionType, ...] = ((LOCAL,) * 5 + (GLOBAL,)) * 3
    query_pre_attn_norm: Norm = Norm.BY_ONE_OVER_SQRT_HEAD_DIM
    attn_logits_soft_cap: float | None = None
    sliding_window_size: int | None = 512
    transpose_gating_einsum: bool = True
    use_qk_norm: bool = True
    local_base_frequency: int = 10_000
    global_base_frequency: int = 1_000_000
    local_scale_factor: float = 1.0
    global_scale_factor: float = 1.0
    vision_encoder: Any = None


def fields(**changes) -> dict[str, Any]:
    config = dataclasses.replace(TransformerConfig(), **changes)
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def test_an_object():
    model = linen.Transformer.from_upstream(TransformerConfig(), dtype="float32")
    assert model.config.model == variants.get("gemma3-270m")
    assert model == linen.Transformer(config=variants.get("gemma3-270m"), dtype="float32")
    assert model.INFO == linen.ShimInfo()


def test_a_mapping_of_names_and_lists():
    config = fields() | {
        "attention_types": [kind.name for kind in TransformerConfig.attention_types],
        "query_pre_attn_norm": "BY_ONE_OVER_SQRT_HEAD_DIM",
    }
    assert linen.Transformer.from_upstream(config).config.model == variants.get("gemma3-270m")


def test_defaults_are_theirs():
    # What their class fills in when it is made with the required fields alone.
    required = {
        name: fields()[name]
        for name in (
            "num_embed",
            "embed_dim",
            "hidden_dim",
            "num_heads",
            "head_dim",
            "num_kv_heads",
            "final_logit_softcap",
            "use_post_attn_norm",
            "use_post_ffw_norm",
        )
    }
    model = linen.Transformer.from_upstream(required | {"attention_types": ["GLOBAL"]})
    (layer,) = model.config.model.layers
    assert layer.ffw.gate_axes == "CDF"
    assert layer.attention.qk_norm is None and layer.attention.softcap is None
    assert layer.attention.query_scale == 256**-0.5
    assert layer.attention.rope.theta == 10_000


def test_every_scale_of_the_query():
    config = fields(query_pre_attn_norm=Norm.BY_EMBED_DIM_DIV_NUM_HEADS)
    model = linen.Transformer.from_upstream(config).config.model
    assert {layer.attention.query_scale for layer in model.layers} == {640 // 4}


def test_a_vision_encoder_is_left_out():
    config = TransformerConfig(vision_encoder=object())
    assert linen.Transformer.from_upstream(config) == linen.Transformer.from_upstream(fields())
    with pytest.raises(ValueError, match="This vision encoder is not of the kind of Gemma 3"):
        linen.Transformer.from_upstream(config, text_only=False)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        (fields() | {"use_rope": True, "alibi": 3}, ValueError, "has also alibi, use_rope"),
        ({"num_embed": 31, "embed_dim": 13}, ValueError, "needs also attention_types, final"),
        (fields(sliding_window_size=None), ValueError, "`sliding_window_size` must be set"),
        (fields(use_post_ffw_norm=False), ValueError, "must be equal.*got True and False"),
        (fields() | {"attention_types": ["RING"]}, ValueError, "`attention_types` .*'RING'"),
        (
            fields() | {"query_pre_attn_norm": "TWICE"},
            ValueError,
            "`query_pre_attn_norm` .*'TWICE'",
        ),
        (fields(num_kv_heads=3), ValueError, "must divide the number of query heads; got 3 and 4"),
        (variants.get("gemma3-270m"), ValueError, "has also"),
        ("gemma3-270m", TypeError, "got a str"),
        (TransformerConfig, TypeError, "got a type"),
    ],
)
def test_what_is_refused(config, error, says):
    with pytest.raises(error, match=says):
        linen.Transformer.from_upstream(config)
