"""Gemma 3n: `config.json` to a `ModelConfig` and back.

What it shares with Gemma 4 is in `_config_shared.py`.

**Source:** transformers `models/gemma3n/configuration_gemma3n.py`.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._fields import Fields
from equigemma.checkpoint.core._layout import dense_of
from equigemma.checkpoint.hf._config_shared import (
    Layer,
    first_global,
    first_local,
    read_attention,
    read_model,
    write_model,
)
from equigemma.checkpoint.hf._options import read_count, read_layer_types, read_ropes, scaling_of
from equigemma.config import AltUpConfig, FeedForwardConfig, LayerConfig, ModelConfig


GEMMA3N: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "vocab_size": 262_400,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size": 2048,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 16_384,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 15,
        "head_dim": 256,
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
        "altup_num_inputs": 4,
        "altup_coef_clip": 120.0,
        "laurel_rank": 64,
    },
}
"""The kinds, and what `transformers` takes for a key that is left out."""


def read_gemma3n(read: Fields) -> ModelConfig:
    """The model that the keys describe."""
    types = read_layer_types(read, read_count(read), period=5)
    return read_model(read, types, _layers(read, types), _read_altup(read))


def _read_altup(read: Fields) -> AltUpConfig:
    read.expect("altup_active_idx", 0)
    read.expect("altup_correct_scale", True)
    streams = read.size("altup_num_inputs")
    return AltUpConfig(
        streams=streams,
        modes=streams,
        clip=read.number_or_none("altup_coef_clip"),
        laurel_rank=read.size("laurel_rank"),
    )


def _layers(read: Fields, types: Sequence[str]) -> Layer:
    count = len(types)
    attention = read_attention(read, types, read_ropes(read))
    hidden = read.take("intermediate_size")
    hidden = hidden if isinstance(hidden, list) else [hidden] * count
    sparsity = read.take("activation_sparsity_pattern")
    if sparsity is None:
        sparse = 10 if count > 10 else 0
        sparsity = [0.95] * sparse + [0.0] * (count - sparse)
    for name, values in (("intermediate_size", hidden), ("activation_sparsity_pattern", sparsity)):
        if not isinstance(values, list) or len(values) != count:
            raise CheckpointError(f"its {name} must have an entry for each of {count} layers.")
    if not all(isinstance(share, int | float) and 0 <= share < 1 for share in sparsity):
        raise CheckpointError("its activation_sparsity_pattern must hold shares from 0 to below 1.")
    if not all(type(size) is int and size > 0 for size in hidden):
        raise CheckpointError("its intermediate_size must be a whole number from 1 up.")

    def layer(index: int, shares: bool) -> LayerConfig:
        del shares
        cutoff = NormalDist().inv_cdf(sparsity[index]) if sparsity[index] else None
        ffw = FeedForwardConfig(hidden_dim=hidden[index], cutoff=cutoff)
        return LayerConfig(attention=attention[types[index]], ffw=ffw)

    return layer


def write_gemma3n(
    config: ModelConfig, stream: AltUpConfig, context_length: int | None
) -> dict[str, Any]:
    """The keys that describe a model; reading them shows whether they say it all."""
    if config.final_softcap is None:
        raise CheckpointError(
            "transformers caps the logits of every Gemma 3n, this model does not. With "
            "final_softcap=30.0 in its config it is what they load."
        )
    far, near = (config.layers[at(config)].attention for at in (first_global, first_local))
    dense = [dense_of(layer) for layer in config.layers]
    return write_model("gemma3n_text", "Gemma3nForCausalLM", config, context_length) | {
        "intermediate_size": [ffw.hidden_dim for ffw in dense],
        "activation_sparsity_pattern": [_sparsity(ffw.cutoff) for ffw in dense],
        "altup_active_idx": 0,
        "altup_correct_scale": True,
        "altup_coef_clip": stream.clip,
        "altup_num_inputs": stream.streams,
        "laurel_rank": stream.laurel_rank,
        # The names that releases before transformers 5 read.
        "rope_theta": far.rope.theta,
        "rope_scaling": scaling_of(far.rope),
        "rope_local_base_freq": near.rope.theta,
    }


def _sparsity(cutoff: float | None) -> float:
    """The share of a normal distribution below a cutoff; a round one if that means the same."""
    if cutoff is None:
        return 0.0
    share = NormalDist().cdf(cutoff)
    close = (round(share, digits) for digits in (2, 6, 12))
    return next((s for s in close if 0 < s < 1 and NormalDist().inv_cdf(s) == cutoff), share)
