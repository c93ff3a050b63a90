"""Gemma 4: `config.json` to a `ModelConfig` and back.

What it shares with Gemma 3n is in `_config_shared.py`.

**Source:** transformers `models/gemma4`, `gemma4_unified`; `integrations/heterogeneity` for options
that layers have of their own.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._fields import Fields, short
from equigemma.checkpoint.core._layout import dense_of
from equigemma.checkpoint.hf._config_shared import (
    Layer,
    first_global,
    read_attention,
    read_model,
    write_model,
)
from equigemma.checkpoint.hf._options import (
    GLOBAL,
    LOCAL,
    read_count,
    read_layer_types,
    read_ropes,
)
from equigemma.config import (
    AttentionConfig,
    DensePlusMoEConfig,
    FeedForwardConfig,
    KeyIsValueConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    OwnKVConfig,
    RopeConfig,
    SharedKVConfig,
)


_BOTH: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
GEMMA4: dict[str, dict[str, Any]] = {
    "gemma4_text": _BOTH
    | {
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "enable_moe_block": False,
    },
    "gemma4_unified_text": _BOTH
    | {"sliding_window": 1024, "use_bidirectional_attention": "vision"},
}
"""The kinds, and what `transformers` takes for a key that is left out."""

# What transformers takes where Gemma 4 says nothing of rotation.
_ROPES = {
    GLOBAL: RopeConfig(theta=1_000_000.0, proportion=0.25),
    LOCAL: RopeConfig(theta=10_000.0),
}


def read_gemma4(read: Fields) -> ModelConfig:
    """The model that the keys describe."""
    sees_images = _sees_images(read)
    types = read_layer_types(read, read_count(read), period=6)
    types = [*types[:-1], GLOBAL]
    return read_model(read, types, _layers(read, types, sees_images))


def _sees_images(read: Fields) -> bool:
    """Whether tokens of an image attend to each other in local layers; text is causal."""
    value = read.take("use_bidirectional_attention")
    if not (value == "vision" or value is None or value is False):
        raise CheckpointError(
            f"its use_bidirectional_attention is {short(value)}; only null and 'vision' are "
            "supported."
        )
    return value == "vision"


def _layers(read: Fields, types: Sequence[str], sees_images: bool) -> Layer:
    told = read.table("rope_parameters")
    ropes = read_ropes(Fields({"rope_parameters": told})) if told else _ROPES
    attention = read_attention(read, types, ropes)
    if sees_images:
        attention[LOCAL] = replace(attention[LOCAL], mask_kind="causal_bidirectional_images")
    tied = _read_bool(read, "attention_k_eq_v")
    heads = read.size_or_none("num_global_key_value_heads")
    global_ = replace(attention[GLOBAL], head_dim=read.size("global_head_dim"))
    # Heads of their own in number go with one projection only.
    if tied and heads:
        global_ = replace(global_, kv=OwnKVConfig(heads=heads))
    global_ = _own(read, types, attention[GLOBAL], global_)
    if tied and isinstance(global_.kv, OwnKVConfig):
        global_ = replace(global_, kv=KeyIsValueConfig(heads=global_.kv.heads))
    attention[GLOBAL] = global_
    hidden, wider = read.size("intermediate_size"), _read_bool(read, "use_double_wide_mlp")
    moe = _read_moe(read)

    def layer(index: int, shares: bool) -> LayerConfig:
        dense = FeedForwardConfig(hidden_dim=2 * hidden if shares and wider else hidden)
        ffw = dense if moe is None else DensePlusMoEConfig(dense=dense, moe=moe)
        return LayerConfig(attention=attention[types[index]], ffw=ffw, skip_scale="learned")

    return layer


def _own(
    read: Fields, types: Sequence[str], shared: AttentionConfig, named: AttentionConfig
) -> AttentionConfig:
    """Attention of global layers: as `per_layer_config` says, beside what all layers share.

    transformers 5.23 writes it instead of the keys named global. Without it those count, `named`.
    """
    table = read.take("per_layer_config")
    if table is None:
        return named
    globals_ = [index for index, name in enumerate(types) if name == GLOBAL]
    try:
        own = {int(index): options for index, options in table.items()}
        first = own.get(globals_[0], {})
        fits = own == ({index: first for index in globals_} if first else {})
        fits = fits and set(first) <= {"head_dim", "num_key_value_heads"}
        fits = fits and all(type(size) is int and size > 0 for size in first.values())
    except (AttributeError, ValueError, TypeError):
        fits, first = False, {}
    if not fits:
        raise CheckpointError(
            "its per_layer_config may give head_dim and num_key_value_heads, the same to all "
            f"layers of type {GLOBAL} and to no other."
        )
    heads = first.get("num_key_value_heads")
    return replace(
        shared,
        head_dim=first.get("head_dim", shared.head_dim),
        kv=shared.kv if heads is None else OwnKVConfig(heads=heads),
    )


def _read_bool(read: Fields, key: str) -> bool:
    value = read.take(key)
    if not isinstance(value, bool):
        raise CheckpointError(f"its {key} must be true or false, got {short(value)}.")
    return value


def _read_moe(read: Fields) -> MoEConfig | None:
    keys = ("num_experts", "top_k_experts", "moe_intermediate_size")
    enabled = read.take("enable_moe_block")
    if not enabled:
        for key in keys:
            read.take(key)
        return None
    experts, chosen, hidden = (read.size(key) for key in keys)
    return MoEConfig(num_experts=experts, num_experts_per_token=chosen, hidden_dim=hidden)


def write_gemma4(config: ModelConfig, context_length: int | None) -> dict[str, Any]:
    """The keys that describe a model; reading them shows whether they say it all."""
    sharing = [layer for layer in config.layers if isinstance(layer.attention.kv, SharedKVConfig)]
    global_ = first_global(config)
    hidden = dense_of(config.layers[0]).hidden_dim
    sees_images = any(
        layer.attention.mask_kind == "causal_bidirectional_images" for layer in config.layers
    )
    data = write_model("gemma4_text", "Gemma4ForCausalLM", config, context_length) | {
        "intermediate_size": hidden,
        "use_double_wide_mlp": any(dense_of(layer).hidden_dim == 2 * hidden for layer in sharing),
        "global_head_dim": config.layers[global_].attention.head_dim,
        "num_global_key_value_heads": config.kv_heads(global_),
        "attention_k_eq_v": isinstance(config.layers[global_].attention.kv, KeyIsValueConfig),
        "use_bidirectional_attention": "vision" if sees_images else None,
        "enable_moe_block": False,
    }
    ffw = config.layers[0].ffw
    if isinstance(ffw, DensePlusMoEConfig):
        data |= {
            "enable_moe_block": True,
            "num_experts": ffw.moe.num_experts,
            "top_k_experts": ffw.moe.num_experts_per_token,
            "moe_intermediate_size": ffw.moe.hidden_dim,
        }
    return data
