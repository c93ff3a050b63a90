"""What the metadata of a GGUF file say about Gemma 3n and 4, and what of a `ModelConfig` they can.

The older architectures are in `_gguf_config.py` and `_gguf_describe.py`, which call this. Much of
Gemma 3n is said in no file: llama.cpp has it as constants, and so has this.

**Source:** llama.cpp `src/models/gemma3n.cpp`, `gemma4.cpp` (`load_arch_hparams`), `models.h` and
`llama-hparams.h` for the constants, `llama-model.cpp` for whose keys are looked at;
`conversion/gemma.py` for what is written.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np

from equigemma.checkpoint._errors import CheckpointError
from equigemma.checkpoint._fields import short
from equigemma.checkpoint._gguf_file import Tensor
from equigemma.checkpoint._gguf_options import Limits, Options, read_locals, read_rope_scale
from equigemma.config import (
    AltUp,
    AttentionConfig,
    Dense,
    DensePlusMoE,
    KeyIsValue,
    LayerConfig,
    ModelConfig,
    MoE,
    NormConfig,
    OwnKV,
    PerLayerConfig,
    RopeConfig,
    SharedKV,
)


GEMMA3N, GEMMA4 = "gemma3n", "gemma4"
# Of Gemma 3n: every fifth layer is global, and the first twenty have keys of their own; of the
# gates in the first ten, the largest twentieth counts.
_PERIOD, _OWNERS, _SPARSE, _SHARE = 5, 20, 10, 0.95
_ALTUP = AltUp(streams=4, modes=4, laurel_rank=64, clip=120.0)
_PER_LAYER = 256
_CAP = 30.0
# Angles are divided by these: one that does not turn is written as a wavelength without end.
_TURNS, _STANDS = 1.0, 1e30


def _read_gemma3n(
    options: Options,
    vocab: int,
    limits: Limits,
    tensors: Mapping[str, Tensor],
    factors: np.ndarray | None,
) -> ModelConfig:
    del tensors, factors
    width, count, hidden = _read_sizes(options, vocab, limits)
    if len(set(hidden)) > 1:
        raise CheckpointError("its feed_forward_length differs from layer to layer.")
    far, near = _read_attention(options, width)
    options.expect("attention.key_length_swa", near.head_dim)
    heads_kv = options.size("attention.head_count_kv")
    streams = options.size("altup.num_inputs", _ALTUP.streams, least=2)
    options.expect("altup.active_idx", 0)
    options.expect("final_logit_softcapping", _CAP)
    dim = options.size("embedding_length_per_layer_input", _PER_LAYER)
    sizes = (far.heads * far.head_dim, heads_kv * far.head_dim, hidden[0], (streams - 1) * width)
    limits.check(count, (*(size * width for size in sizes), vocab * dim * count))
    norm = _read_norm(options)
    cutoffs = _read_cutoffs(options, count)
    is_local = read_locals(options, count, period=_PERIOD)
    shared = options.size("attention.shared_kv_layers", max(count - _OWNERS, 0), least=0)
    owners = _owners(is_local, shared)
    layers = (
        LayerConfig(
            attention=_with_norms(
                near if local else far,
                norm,
                OwnKV(heads=heads_kv) if owner == index else SharedKV(layer=owner),
            ),
            ffw=Dense(hidden=hidden[0], cutoff=cutoffs[index]),
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


def _read_gemma4(
    options: Options,
    vocab: int,
    limits: Limits,
    tensors: Mapping[str, Tensor],
    factors: np.ndarray | None,
) -> ModelConfig:
    width, count, hidden = _read_sizes(options, vocab, limits)
    heads_kv = options.sizes("attention.head_count_kv", count)
    far, near = _read_attention(options, width)
    near = replace(near, head_dim=options.size("attention.key_length_swa", far.head_dim))
    options.expect("attention.value_length_swa", near.head_dim)
    options.expect("rope.dimension_count_swa", near.head_dim)
    dim = options.size("embedding_length_per_layer_input", 0, least=0)
    moe = _read_moe(options)
    sizes = [max(hidden), *(each.heads * each.head_dim for each in (far, near))]
    sizes += [] if moe is None else [2 * moe.experts * moe.hidden]
    limits.check(count, (*(size * width for size in sizes), vocab * dim * count))
    norm = _read_norm(options)
    is_local = _read_listed(options, count)
    if not all(is_local):
        far = replace(far, rope=replace(far.rope, proportion=_proportion(factors, far.head_dim)))
    if not dim:
        # The models without a second embedding are those that were trained on images so.
        near = replace(near, visibility="causal_or_same_block")
    owners = _owners(is_local, options.size("attention.shared_kv_layers", 0, least=0))

    def layer(index: int) -> LayerConfig:
        has = [f"blk.{index}.{name}.weight" in tensors for name in ("attn_v", "layer_output_scale")]
        own = (OwnKV if has[0] else KeyIsValue)(heads=heads_kv[index])
        kv = own if owners[index] == index else SharedKV(layer=owners[index])
        dense = Dense(hidden=hidden[index])
        return LayerConfig(
            attention=_with_norms(near if is_local[index] else far, norm, kv),
            ffw=dense if moe is None else DensePlusMoE(dense=dense, moe=moe),
            pre_norm=norm,
            post_norm=norm,
            skip_scale="learned" if has[1] else None,
        )

    return ModelConfig(
        vocab=vocab,
        width=width,
        layers=tuple(map(layer, range(count))),
        final_norm=norm,
        final_softcap=options.number("final_logit_softcapping", _CAP) or None,
        per_layer=PerLayerConfig(vocab=vocab, dim=dim, norm=norm) if dim else None,
    )


_Read = Callable[
    [Options, int, Limits, Mapping[str, Tensor], np.ndarray | None],
    ModelConfig,
]
NEWER: dict[str, _Read] = {GEMMA3N: _read_gemma3n, GEMMA4: _read_gemma4}
"""Architectures, and what reads their config: from options, the number of tokens, what the file
holds, its tensors, and the factors of angles."""


def _read_sizes(options: Options, vocab: int, limits: Limits) -> tuple[int, int, list[int]]:
    """Width, number of layers, and hidden size of each one's feed-forward."""
    width, count = options.size("embedding_length"), options.size("block_count")
    limits.check(count, (vocab * width,))
    return width, count, options.sizes("feed_forward_length", count)


def _read_norm(options: Options) -> NormConfig:
    return NormConfig(epsilon=options.number("attention.layer_norm_rms_epsilon"), offset=0.0)


def _read_attention(options: Options, width: int) -> tuple[AttentionConfig, AttentionConfig]:
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
            kv=OwnKV(heads=1),
            rope=RopeConfig(theta=options.number(key, 10_000.0)),
            query_scale=1.0,
        )
        for key in ("rope.freq_base", "rope.freq_base_swa")
    )
    return far, replace(near, window=options.size("attention.sliding_window"))


def _with_norms(
    attention: AttentionConfig, norm: NormConfig, kv: OwnKV | KeyIsValue | SharedKV
) -> AttentionConfig:
    return replace(attention, kv=kv, qk_norm=norm, v_norm=replace(norm, offset=None))


def _owners(is_local: list[bool], shared: int) -> list[int]:
    """Whose keys each layer looks at: from where sharing starts, those of the last two before."""
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


def _read_listed(options: Options, count: int) -> list[bool]:
    listed = options.optional("attention.sliding_window_pattern", None)
    if not isinstance(listed, list) or len(listed) != count:
        raise CheckpointError(
            f"its attention.sliding_window_pattern must have an entry for each of {count} layers; "
            f"got {short(listed)}."
        )
    return [bool(here) for here in listed]


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


def _read_moe(options: Options) -> MoE | None:
    experts = options.size("expert_count", 0, least=0)
    if not experts:
        return None
    chosen, hidden = (
        options.size(key) for key in ("expert_used_count", "expert_feed_forward_length")
    )
    return MoE(experts=experts, chosen=chosen, hidden=hidden)


def _proportion(factors: np.ndarray | None, head_dim: int) -> float:
    """The share of a head that turns."""
    pairs = 0 if factors is None else int((factors == _TURNS).sum())
    if factors is None or not pairs or not np.array_equal(factors, _factors(pairs, head_dim)):
        raise CheckpointError(
            f"its rope_freqs.weight must be {head_dim // 2} numbers, first {_TURNS} where an angle "
            f"of a global layer turns, then {_STANDS} where none does."
        )
    return 2 * pairs / head_dim


def _factors(pairs: int, head_dim: int) -> np.ndarray:
    return np.where(np.arange(head_dim // 2) < pairs, _TURNS, _STANDS).astype(np.float32)


def factors_of(config: ModelConfig) -> np.ndarray | None:
    """What llama.cpp divides the angles of global layers by, if it wants to be told."""
    far = next((each.attention for each in config.layers if each.attention.window is None), None)
    if far is None or isinstance(config.stream, AltUp):
        return None
    return _factors(turning(far), far.head_dim)


def turning(attention: AttentionConfig) -> int:
    """How many pairs of each head turn, as `nn` has it."""
    return int(attention.rope.proportion * attention.head_dim // 2)


def describe_newer(config: ModelConfig) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The architecture, what llama.cpp reads about it, and what it knows but other readers do not.

    What the numbers say of layer after layer is said of the first of its kind; reading it back
    shows whether that was enough.
    """
    layers = config.layers
    locals_ = [layer.attention.window is not None for layer in layers]
    kinds = {local: index for index, local in reversed(list(enumerate(locals_)))}
    if True not in kinds:
        raise CheckpointError("llama.cpp knows no such model without a layer that has a window.")
    far = layers[kinds.get(False, 0)].attention
    near = layers[kinds[True]].attention
    dense = [layer.ffw if isinstance(layer.ffw, Dense) else layer.ffw.dense for layer in layers]
    shared = sum(isinstance(layer.attention.kv, SharedKV) for layer in layers)
    heads_kv = [config.kv_heads(index) for index in range(len(layers))]
    told: dict[str, Any] = {
        "embedding_length": config.width,
        "block_count": len(layers),
        "feed_forward_length": _once([ffw.hidden for ffw in dense]),
        "attention.head_count": far.heads,
        "attention.head_count_kv": _once(heads_kv),
        "attention.key_length": far.head_dim,
        "attention.value_length": far.head_dim,
        "attention.layer_norm_rms_epsilon": config.final_norm.epsilon,
        "attention.sliding_window": near.window,
        "rope.freq_base": far.rope.theta,
        "rope.freq_base_swa": near.rope.theta,
    }
    per_layer = {
        "embedding_length_per_layer_input": config.per_layer.dim if config.per_layer else 0
    }
    sharing = {"attention.shared_kv_layers": shared, "attention.sliding_window_pattern": locals_}
    if isinstance(config.stream, AltUp):
        cutoffs = [-math.inf if ffw.cutoff is None else ffw.cutoff for ffw in dense]
        return (
            GEMMA3N,
            told,
            {
                **per_layer,
                **sharing,
                "altup.active_idx": 0,
                "altup.num_inputs": config.stream.streams,
                "activation_sparsity_scale": cutoffs,
            },
        )
    told |= {
        **per_layer,
        **sharing,
        "attention.key_length_swa": near.head_dim,
        "attention.value_length_swa": near.head_dim,
        "rope.dimension_count": far.head_dim,
        "rope.dimension_count_swa": near.head_dim,
        "final_logit_softcapping": config.final_softcap or 0.0,
    }
    if isinstance(layers[0].ffw, DensePlusMoE):
        moe = layers[0].ffw.moe
        told |= {
            "expert_count": moe.experts,
            "expert_used_count": moe.chosen,
            "expert_feed_forward_length": moe.hidden,
        }
    return GEMMA4, told, {}


def _once(values: list[int]) -> int | list[int]:
    """A number that is the same for all layers is said once."""
    return values[0] if len(set(values)) == 1 else values
