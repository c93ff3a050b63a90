"""`config.json` of a Hugging Face folder to a `ModelConfig`; `_config_write.py` is the way back.

Every key is used, or checked against the only value that is supported, or has no effect on the
numbers; any other is refused by name. A key that is left out has the value that `transformers`
takes then. Releases before and after its version 5 name the rotary options differently: both forms
are read.

**Source:** transformers `models/gemma/configuration_gemma.py`, `gemma2`, `gemma3`;
`configuration_utils.py` and `modeling_rope_utils.py` for the rotary options.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._fields import Fields, short
from equigemma.checkpoint.core._layout import is_gemma2_without_post_norms
from equigemma.checkpoint.hf._config_gemma3n import GEMMA3N, read_gemma3n
from equigemma.checkpoint.hf._config_gemma4 import GEMMA4, read_gemma4
from equigemma.checkpoint.hf._options import (
    ACTIVATION,
    GLOBAL,
    LOCAL,
    expect_fixed,
    read_count,
    read_layer_types,
    read_rope,
    read_ropes,
)
from equigemma.checkpoint.hf._unsupported import UNSUPPORTED
from equigemma.checkpoint.hf._vision import read_vision
from equigemma.checkpoint.hf._without_effect import (
    WITHOUT_EFFECT,
    WITHOUT_EFFECT_AROUND_GEMMA3,
    WITHOUT_EFFECT_AROUND_NEWER,
)
from equigemma.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
    OwnKVConfig,
    RopeConfig,
)


# Kinds with a text model inside, and which.
_AROUND_TEXT = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
}
KINDS = ("gemma", "gemma2", "gemma3_text", "vaultgemma", *GEMMA3N, *GEMMA4, *_AROUND_TEXT)

_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
    },
    "gemma2": {
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
}
_DEFAULTS["vaultgemma"] = _DEFAULTS["gemma2"]
_DEFAULTS["gemma3_text"] = _DEFAULTS["gemma2"] | {
    "vocab_size": 262_208,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}


def read_config(data: Mapping[str, Any], *, text_only: bool = False) -> ModelConfig:
    """The config of the model that a `config.json` describes.

    Of Gemma 3 with its vision tower, if there is one; of later generations the text model.

    **Arguments:** `text_only`: without a vision tower, of which nothing is read then.

    **Raises:** `CheckpointError` for an unknown kind of model, or an option that is not supported.
    """
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        reason = UNSUPPORTED.get(kind, "") if isinstance(kind, str) else ""
        raise CheckpointError(
            f"its model_type is {short(kind)}; {reason}the known ones are {', '.join(KINDS)}."
        )
    vision, is_tied = None, None
    if kind in _AROUND_TEXT:
        around = Fields(data)
        is_tied = _read_tied(around)
        if kind == "gemma3" and not text_only:
            vision = read_vision(around)
        kind = _AROUND_TEXT[kind]
        data = _read_text(around, kind, text_only)
    read = Fields(data, (_DEFAULTS | GEMMA3N | GEMMA4)[kind])
    inner_is_tied = _read_tied(read)
    # What is said around a text model counts, as in transformers.
    is_tied = inner_is_tied if is_tied is None else is_tied
    try:
        config = _read(kind, read)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"its config.json describes no valid model. {error}") from error
    read.refuse_rest(WITHOUT_EFFECT)
    # A bidirectional model has no LM head.
    if not is_tied and config.layers[0].attention.mask_kind != "bidirectional":
        config = replace(config, lm_head="untied")
    return config if vision is None else config.with_vision(vision)


def _read_text(around: Fields, kind: str, text_only: bool) -> dict[str, Any]:
    """The table of the text model in a config of one kind of more; the rest is checked."""
    text = around.table("text_config")
    expect_fixed(around)
    is_whole = kind == "gemma3_text" and not text_only
    around.refuse_rest(WITHOUT_EFFECT_AROUND_GEMMA3 if is_whole else WITHOUT_EFFECT_AROUND_NEWER)
    data = {"model_type": kind} | text
    if data["model_type"] != kind:
        raise CheckpointError(f"its text_config.model_type is {short(data['model_type'])}.")
    return data


def _read_tied(read: Fields) -> bool:
    value = read.take("tie_word_embeddings", True)
    if not isinstance(value, bool):
        raise CheckpointError(f"its tie_word_embeddings must be true or false, got {short(value)}.")
    return value


def _read(kind: str, read: Fields) -> ModelConfig:
    if kind in GEMMA3N:
        return read_gemma3n(read)
    return read_gemma4(read) if kind in GEMMA4 else _read_older(kind, read)


def _read_older(kind: str, read: Fields) -> ModelConfig:
    looks_ahead = False
    if kind == "gemma3_text":
        looks_ahead = read.take("use_bidirectional_attention")
        if not isinstance(looks_ahead, bool | None):
            raise CheckpointError(
                f"its use_bidirectional_attention must be true or false, got {short(looks_ahead)}."
            )
    expect_fixed(read)
    if kind == "gemma":
        # The first releases said gelu and meant its tanh form; transformers reads it so too.
        read.expect("hidden_act", ACTIVATION, "gelu")
        read.expect("hidden_activation", ACTIVATION, None)
    else:
        read.expect("hidden_activation", ACTIVATION)
        read.expect("hidden_act", ACTIVATION)
    count = read_count(read)
    head_dim = read.size("head_dim")
    norm = NormConfig(epsilon=read.number("rms_norm_eps", 1e-6))
    ropes = _read_ropes(kind, read)
    block = LayerConfig(
        attention=AttentionConfig(
            heads=read.size("num_attention_heads"),
            head_dim=head_dim,
            kv=OwnKVConfig(heads=read.size("num_key_value_heads")),
            rope=ropes[GLOBAL],
            query_scale=head_dim**-0.5,
        ),
        ffw=FeedForwardConfig(hidden_dim=read.size("intermediate_size")),
        pre_norm=norm,
    )
    layers, final_softcap = (block,) * count, None
    if kind != "gemma":
        final_softcap = read.number_or_none("final_logit_softcapping")
        layers = _read_layers(kind, read, block, ropes, count)
    if looks_ahead:
        layers = tuple(map(_looking_ahead, layers))
    config = ModelConfig(
        vocab=read.size("vocab_size"),
        width=read.size("hidden_size"),
        layers=layers,
        final_norm=norm,
        final_softcap=final_softcap,
    )
    if kind == "vaultgemma" and not is_gemma2_without_post_norms(config):
        raise CheckpointError(
            "its model_type is 'vaultgemma', but it has no soft caps, no windows and no scale of "
            "queries of its own, which makes it a model of the kind 'gemma'."
        )
    return config


def _read_layers(
    kind: str, read: Fields, block: LayerConfig, ropes: Mapping[str, RopeConfig], count: int
) -> tuple[LayerConfig, ...]:
    scalar = read.number("query_pre_attn_scalar")
    if scalar <= 0:
        raise CheckpointError(f"its query_pre_attn_scalar must be positive, got {scalar}.")
    softcap = read.number_or_none("attn_logit_softcapping")
    if kind == "gemma3_text" and softcap is not None:
        # transformers reads this option and never uses it.
        raise CheckpointError(f"its attn_logit_softcapping is {softcap}; only null is supported.")
    global_ = replace(
        block,
        attention=replace(
            block.attention,
            query_scale=scalar**-0.5,
            softcap=softcap,
            qk_norm=block.pre_norm if kind == "gemma3_text" else None,
        ),
        post_norm=None if kind == "vaultgemma" else block.pre_norm,
    )
    types = read_layer_types(read, count, period=6 if kind == "gemma3_text" else 2)
    window = read.size("sliding_window") if LOCAL in types else None
    read.take("sliding_window")
    local = replace(global_, attention=replace(global_.attention, window=window, rope=ropes[LOCAL]))
    return tuple(local if here == LOCAL else global_ for here in types)


def _looking_ahead(layer: LayerConfig) -> LayerConfig:
    """The layer with all in view; then files count a window on both sides of a token together."""
    window = layer.attention.window
    window = None if window is None else window // 2 + 1
    return replace(
        layer, attention=replace(layer.attention, window=window, mask_kind="bidirectional")
    )


def _read_ropes(kind: str, read: Fields) -> dict[str, RopeConfig]:
    """The rotary options of local and global layers, from the older keys, the newer, or both."""
    if kind == "gemma3_text":
        return read_ropes(read)
    scaling = read.table("rope_scaling")
    theta = read.number_or_none("rope_theta")
    parameters = read.table("rope_parameters")
    rope = read_rope(parameters, "rope_parameters.", theta, scaling, 10_000.0)
    return {LOCAL: rope, GLOBAL: rope}
