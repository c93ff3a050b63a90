"""Gemma 3n: metadata of a GGUF file to a `ModelConfig` and back.

What it shares with Gemma 4 is in `_config_shared.py`. Much of Gemma 3n is said in no file:
llama.cpp has it as constants, and so has this.

**Source:** llama.cpp `src/models/gemma3n.cpp` (`load_arch_hparams`); `models.h` and
`llama-hparams.h` for the constants; `conversion/gemma.py` for what is written.
"""

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._fields import short
from equigemma.checkpoint.core._layout import dense_of
from equigemma.checkpoint.gguf._config_shared import (
    Described,
    Source,
    describe_model,
    describe_sharing,
    owners_of,
    read_attention,
    read_norm,
    read_sizes,
    with_norms,
)
from equigemma.checkpoint.gguf._options import Options, read_locals
from equigemma.config import (
    AltUpConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    OwnKVConfig,
    PerLayerConfig,
    SharedKVConfig,
)


GEMMA3N = "gemma3n"
# Every fifth layer is global, and the first twenty have keys of their own; of the
# gates in the first ten, the largest twentieth counts.
_PERIOD, _OWNERS, _SPARSE, _SHARE = 5, 20, 10, 0.95
_ALTUP = AltUpConfig(streams=4, modes=4, laurel_rank=64, clip=120.0)
_PER_LAYER = 256
_CAP = 30.0


def read_gemma3n(source: Source) -> ModelConfig:
    """The config that a file describes."""
    options, vocab, limits = source.options, source.vocab, source.limits
    width, count, hidden = read_sizes(options, vocab, limits)
    if len(set(hidden)) > 1:
        raise CheckpointError("its feed_forward_length differs from layer to layer.")
    far, near = read_attention(options, width)
    options.expect("attention.key_length_swa", near.head_dim)
    heads_kv = options.size("attention.head_count_kv")
    streams = options.size("altup.num_inputs", _ALTUP.streams, least=2)
    options.expect("altup.active_idx", 0)
    options.expect("final_logit_softcapping", _CAP)
    dim = options.size("embedding_length_per_layer_input", _PER_LAYER)
    sizes = (far.heads * far.head_dim, heads_kv * far.head_dim, hidden[0], (streams - 1) * width)
    limits.check(count, (*(size * width for size in sizes), vocab * dim * count))
    norm = read_norm(options)
    cutoffs = _read_cutoffs(options, count)
    is_local = read_locals(options, count, period=_PERIOD)
    shared = options.size("attention.shared_kv_layers", max(count - _OWNERS, 0), least=0)
    owners = owners_of(is_local, shared)
    layers = (
        LayerConfig(
            attention=with_norms(
                near if local else far,
                norm,
                OwnKVConfig(heads=heads_kv) if owner == index else SharedKVConfig(layer=owner),
            ),
            ffw=FeedForwardConfig(hidden_dim=hidden[0], cutoff=cutoffs[index]),
            pre_norm=norm,
            post_norm=norm,
        )
        for index, (local, owner) in enumerate(zip(is_local, owners, strict=True))
    )
    return ModelConfig(
        vocab=vocab,
        width=width,
        layers=tuple(layers),
        final_norm=norm,
        final_softcap=_CAP,
        stream=replace(_ALTUP, streams=streams, modes=streams),
        per_layer=PerLayerConfig(vocab=vocab, dim=dim, norm=norm),
    )


def _read_cutoffs(options: Options, count: int) -> list[float | None]:
    """Standard deviations above the mean from which on gates count, of each layer that says so."""
    told = options.optional("activation_sparsity_scale", None)
    if told is None:
        return _cutoffs(count)
    if not isinstance(told, list) or len(told) != count or any(map(_is_no_cutoff, told)):
        raise CheckpointError(
            f"its activation_sparsity_scale must have a number for each of {count} layers, -inf "
            f"where all gates count; got {short(told)}."
        )
    return [None if value == -math.inf else _round_cutoff(value) for value in told]


def _cutoffs(count: int) -> list[float | None]:
    cutoff = NormalDist().inv_cdf(_SHARE)
    return [cutoff if index < _SPARSE else None for index in range(count)]


def _is_no_cutoff(value: Any) -> bool:
    return not isinstance(value, float) or math.isnan(value) or value == math.inf


def _round_cutoff(value: float) -> float:
    """The cutoff that was meant: of a round share, which files give with 32 bits or fewer."""
    share = round(NormalDist().cdf(value), 3)
    if not 0.0 < share < 1.0:
        return value
    meant = NormalDist().inv_cdf(share)
    return meant if abs(meant - value) < 1e-6 else value


def describe_gemma3n(config: ModelConfig, stream: AltUpConfig) -> Described:
    """What is said of a model; reading it back shows whether that was enough."""
    cutoffs = [dense_of(layer).cutoff for layer in config.layers]
    noted = describe_sharing(config) | {
        "altup.active_idx": 0,
        "altup.num_inputs": stream.streams,
        "activation_sparsity_scale": [-math.inf if cut is None else cut for cut in cutoffs],
    }
    return Described(GEMMA3N, describe_model(config), noted)
