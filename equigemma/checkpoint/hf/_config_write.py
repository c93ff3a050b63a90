"""A `ModelConfig` to the `config.json` of a Hugging Face folder, from which others build the model.

The rotary options are written in both forms that `_config.py` reads.

**Source:** transformers `models/gemma/configuration_gemma.py`, `gemma2`, `gemma3`.
"""

from typing import Any

from equigemma.checkpoint.core._layout import (
    check_described,
    is_gemma2_without_post_norms,
    is_newer,
    uniform,
)
from equigemma.checkpoint.hf._config import read_config
from equigemma.checkpoint.hf._config_gemma3n import write_gemma3n
from equigemma.checkpoint.hf._config_gemma4 import write_gemma4
from equigemma.checkpoint.hf._options import (
    ACTIVATION,
    GLOBAL,
    LOCAL,
    rope_parameters_of,
    scaling_of,
)
from equigemma.checkpoint.hf._vision import write_vision
from equigemma.config import AltUpConfig, ModelConfig, RopeConfig


def write_config(config: ModelConfig, context_length: int | None = None) -> dict[str, Any]:
    """What a `config.json` says about a model: architecture only, no token ids and no dtype.

    **Raises:** `CheckpointError` if no kind of model that `transformers` knows is this one.
    """
    data = _write(config, context_length)
    # Whether the description says it all is not argued but tried.
    check_described(config, read_config(data), data["model_type"])
    return data


def _write(config: ModelConfig, context_length: int | None) -> dict[str, Any]:
    if is_newer(config):
        if isinstance(config.stream, AltUpConfig):
            return write_gemma3n(config, config.stream, context_length)
        return write_gemma4(config, context_length)
    if config.vision is not None:
        return write_vision(config, write_config(config.text_only(), context_length))
    return _write_older(config, context_length)


def _write_older(config: ModelConfig, context_length: int | None) -> dict[str, Any]:
    parts = uniform(config)
    attention = parts.attention
    kind = "gemma"
    if is_gemma2_without_post_norms(config):
        kind = "vaultgemma"
    elif parts.first.post_norm is not None:
        kind = "gemma2" if attention.qk_norm is None else "gemma3_text"
    rope = (parts.global_ or attention).rope
    data: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": parts.hidden,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": parts.kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": config.final_norm.epsilon,
        "hidden_act" if kind == "gemma" else "hidden_activation": ACTIVATION,
        "max_position_embeddings": context_length or _context_length(kind, rope),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.lm_head == "tied",
        "use_cache": True,
        "initializer_range": 0.02,
    }
    # The older names of the rotary options; those of transformers 5 follow below.
    data |= {"rope_theta": rope.theta, "rope_scaling": scaling_of(rope)}
    data["rope_parameters"] = rope_parameters_of(rope)
    if kind != "gemma":
        data |= {
            "query_pre_attn_scalar": _query_scalar(attention.query_scale),
            "sliding_window": parts.local.window if parts.local else 4096,
            "layer_types": [LOCAL if layer.attention.window else GLOBAL for layer in config.layers],
            "final_logit_softcapping": config.final_softcap,
            "attn_logit_softcapping": attention.softcap,
        }
    if kind == "gemma3_text" and attention.mask_kind == "bidirectional":
        data |= {"architectures": ["Gemma3TextModel"], "use_bidirectional_attention": True}
        if parts.local is not None and parts.local.window is not None:
            data["sliding_window"] = 2 * (parts.local.window - 1)
    if kind == "gemma3_text":
        nearby = parts.local.rope if parts.local else RopeConfig()
        data["rope_local_base_freq"] = nearby.theta
        data["rope_parameters"] = {
            GLOBAL: rope_parameters_of(rope),
            LOCAL: rope_parameters_of(nearby),
        }
    return data


_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def _query_scalar(scale: float) -> int:
    """The whole number whose root the queries are divided by; a wrong one is noticed on reading."""
    return max(1, round(scale**-2))


def _context_length(kind: str, rope: RopeConfig) -> int:
    if kind != "gemma3_text":
        return 8192
    return 32_768 if rope.scale == 1.0 else 131_072
