"""Metadata of a GGUF file that Gemma 3n and 4 share.

What each has of its own is in `_config_gemma3n.py` and `_config_gemma4.py`, which call
this.

**Source:** llama.cpp `src/models/gemma3n.cpp`, `gemma4.cpp` (`load_arch_hparams`);
`llama-model.cpp` for whose keys are shared; `conversion/gemma.py` for what is written.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._layout import dense_of
from equigemma.checkpoint.gguf._container import Tensor
from equigemma.checkpoint.gguf._options import Limits, Options, read_rope_scale
from equigemma.config import (
    AttentionConfig,
    KeyIsValueConfig,
    ModelConfig,
    NormConfig,
    OwnKVConfig,
    RopeConfig,
    SharedKVConfig,
)


class Source(NamedTuple):
    """What of a file a config is read from."""

    options: Options
    vocab: int
    """The number of tokens."""
    limits: Limits
    tensors: Mapping[str, Tensor]
    factors: np.ndarray | None
    """What angles are divided by, if the file says."""


class Described(NamedTuple):
    """What the metadata of a file say about a model, without the architecture in front."""

    architecture: str
    told: dict[str, Any]
    """What llama.cpp reads."""
    noted: dict[str, Any]
    """What it knows but other readers do not."""


def read_sizes(options: Options, vocab: int, limits: Limits) -> tuple[int, int, list[int]]:
    """Width, number of layers, and hidden size of each one's feed-forward."""
    width, count = options.size("embedding_length"), options.size("block_count")
    limits.check(count, (vocab * width,))
    return width, count, options.sizes("feed_forward_length", count)


def read_norm(options: Options) -> NormConfig:
    return NormConfig(epsilon=options.number("attention.layer_norm_rms_epsilon"), offset=0.0)


def read_attention(options: Options, width: int) -> tuple[AttentionConfig, AttentionConfig]:
    """Of global and local layers, with keys and norms to be put in."""
    heads = options.size("attention.head_count")
    head_dim = options.size("attention.key_length", max(width // heads, 1))
    options.expect("attention.value_length", head_dim)
    options.expect("rope.dimension_count", head_dim)
    if (scale := read_rope_scale(options)) != 1.0:
        raise CheckpointError(f"its positions are scaled by {scale}, which is so in no such model.")
    far, near = (
        AttentionConfig(
            heads=heads,
            head_dim=head_dim,
            kv=OwnKVConfig(heads=1),
            rope=RopeConfig(theta=options.number(key, 10_000.0)),
            query_scale=1.0,
        )
        for key in ("rope.freq_base", "rope.freq_base_swa")
    )
    return far, replace(near, window=options.size("attention.sliding_window"))


def with_norms(
    attention: AttentionConfig,
    norm: NormConfig,
    kv: OwnKVConfig | KeyIsValueConfig | SharedKVConfig,
) -> AttentionConfig:
    return replace(attention, kv=kv, qk_norm=norm, v_norm=replace(norm, offset=None))


def owners_of(is_local: list[bool], shared: int) -> list[int]:
    """Whose keys each layer attends to: from where sharing starts, those of the last two before."""
    first = len(is_local) - shared
    if shared and first < 2:
        raise CheckpointError(
            f"its attention.shared_kv_layers is {shared}, which leaves too few of "
            f"{len(is_local)} layers with keys of their own."
        )
    return [
        *range(first),
        *(first - (2 if local else 1) for local in is_local[first:]),
    ]


def describe_model(config: ModelConfig) -> dict[str, Any]:
    """What is said of a model of either generation.

    What the numbers say of layer after layer is said of the first of its kind; reading it back
    shows whether that was enough.
    """
    near = first_local(config)
    far = next((each.attention for each in config.layers if each.attention.window is None), near)
    heads_kv = [config.kv_heads(index) for index in range(len(config.layers))]
    return {
        "embedding_length": config.width,
        "block_count": len(config.layers),
        "feed_forward_length": _once([dense_of(layer).hidden_dim for layer in config.layers]),
        "attention.head_count": far.heads,
        "attention.head_count_kv": _once(heads_kv),
        "attention.key_length": far.head_dim,
        "attention.value_length": far.head_dim,
        "attention.layer_norm_rms_epsilon": config.final_norm.epsilon,
        "attention.sliding_window": near.window,
        "rope.freq_base": far.rope.theta,
        "rope.freq_base_swa": near.rope.theta,
    }


def describe_sharing(config: ModelConfig) -> dict[str, Any]:
    """Which layers have a window, which attend to the keys of others, and how wide a layer's own
    embedding is.
    """
    return {
        "embedding_length_per_layer_input": config.per_layer.dim if config.per_layer else 0,
        "attention.shared_kv_layers": sum(
            isinstance(layer.attention.kv, SharedKVConfig) for layer in config.layers
        ),
        "attention.sliding_window_pattern": [
            layer.attention.window is not None for layer in config.layers
        ],
    }


def first_local(config: ModelConfig) -> AttentionConfig:
    """Attention of the first layer with a window.

    **Raises:** `CheckpointError` if there is none.
    """
    for layer in config.layers:
        if layer.attention.window is not None:
            return layer.attention
    raise CheckpointError("llama.cpp knows no such model without a layer that has a window.")


def _once(values: list[int]) -> int | list[int]:
    """A number that is the same for all layers is said once."""
    return values[0] if len(set(values)) == 1 else values
