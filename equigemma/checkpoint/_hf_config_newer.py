"""What a `config.json` says about Gemma 3n and 4, and what of a `ModelConfig` it can say.

The keys of the older kinds are in `_hf_config.py`, which calls this.

**Source:** transformers `models/gemma3n/configuration_gemma3n.py`, `gemma4`, `gemma4_unified`;
`integrations/heterogeneity` for options that layers have of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

from equigemma.checkpoint._errors import CheckpointError
from equigemma.checkpoint._fields import Fields, short
from equigemma.checkpoint._hf_options import (
    ACTIVATION,
    GLOBAL,
    LOCAL,
    expect_fixed,
    read_count,
    read_layer_types,
    read_ropes,
    rope_parameters_of,
    scaling_of,
)
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
    Plain,
    RopeConfig,
    SharedKV,
)


_GEMMA4: dict[str, Any] = {
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
NEWER: dict[str, dict[str, Any]] = {
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
    "gemma4_text": _GEMMA4
    | {
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "enable_moe_block": False,
    },
    "gemma4_unified_text": _GEMMA4
    | {"sliding_window": 1024, "use_bidirectional_attention": "vision"},
}
"""The kinds, and what `transformers` takes for a key that is left out."""

_ARCHITECTURES = {"gemma3n_text": "Gemma3nForCausalLM", "gemma4_text": "Gemma4ForCausalLM"}


def read_newer(kind: str, read: Fields) -> ModelConfig:
    """The model that the keys describe."""
    sees_images = _sees_images(kind, read)
    expect_fixed(read)
    read.expect("hidden_activation", ACTIVATION)
    count = read_count(read)
    types = read_layer_types(read, count, period=5 if kind == "gemma3n_text" else 6)
    if kind != "gemma3n_text":
        types = [*types[:-1], GLOBAL]
    owners = _owners(read, types)
    layer = _gemma3n_layers(read, types) if kind == "gemma3n_text" else _gemma4_layers(read, types)
    norm = NormConfig(epsilon=read.number("rms_norm_eps", 1e-6), offset=0.0)
    layers = tuple(
        _with_norms(layer(index, owner != index), norm, None if owner == index else owner)
        for index, owner in enumerate(owners)
    )
    if sees_images:
        layers = tuple(map(_seeing_images, layers))
    return ModelConfig(
        vocab=read.size("vocab_size"),
        width=read.size("hidden_size"),
        layers=layers,
        final_norm=norm,
        final_softcap=read.number_or_none("final_logit_softcapping"),
        per_layer=_read_per_layer(read, norm),
        stream=_read_altup(read) if kind == "gemma3n_text" else Plain(),
    )


def _sees_images(kind: str, read: Fields) -> bool:
    """Whether tokens of an image see each other in local layers; text is causal either way."""
    value = read.take("use_bidirectional_attention")
    known = value == "vision" and kind != "gemma3n_text"
    if not (known or value is None or value is False):
        raise CheckpointError(
            f"its use_bidirectional_attention is {short(value)}; only null and, in Gemma 4, "
            "'vision' are supported."
        )
    return known


def _seeing_images(layer: LayerConfig) -> LayerConfig:
    if layer.attention.window is None:
        return layer
    return replace(layer, attention=replace(layer.attention, visibility="causal_or_same_block"))


def _owners(read: Fields, types: Sequence[str]) -> list[int]:
    """Whose keys each layer looks at: before sharing starts its own, then the last of its type."""
    shared = read.number("num_kv_shared_layers")
    first = len(types) - int(shared)
    if not 0 <= first <= len(types) or shared != int(shared):
        raise CheckpointError(
            f"its num_kv_shared_layers must be a whole number from 0 to {len(types)}, got "
            f"{shared!r}."
        )
    own = list(types[:first])
    if missing := set(types[first:]) - set(own):
        raise CheckpointError(
            f"its num_kv_shared_layers is {shared}, which leaves no {min(missing)} layer with keys "
            "of its own."
        )
    last = {name: first - 1 - own[::-1].index(name) for name in set(own)}
    return [*range(first), *(last[name] for name in types[first:])]


def _with_norms(layer: LayerConfig, norm: NormConfig, owner: int | None) -> LayerConfig:
    attention = replace(
        layer.attention,
        qk_norm=norm,
        v_norm=replace(norm, offset=None),
        kv=layer.attention.kv if owner is None else SharedKV(layer=owner),
    )
    return replace(layer, attention=attention, pre_norm=norm, post_norm=norm)


def _read_per_layer(read: Fields, norm: NormConfig) -> PerLayerConfig | None:
    vocab, dim = (read.take(f"{part}_size_per_layer_input") for part in ("vocab", "hidden"))
    if not dim:
        return None
    for name, value in (("vocab", vocab), ("hidden", dim)):
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"its {name}_size_per_layer_input must be a whole number from 1 up, got "
                f"{short(value)}."
            )
    return PerLayerConfig(vocab=vocab, dim=dim, norm=norm)


def _read_altup(read: Fields) -> AltUp:
    read.expect("altup_active_idx", 0)
    read.expect("altup_correct_scale", True)
    streams = read.size("altup_num_inputs")
    return AltUp(
        streams=streams,
        modes=streams,
        clip=read.number_or_none("altup_coef_clip"),
        laurel_rank=read.size("laurel_rank"),
    )


_Layer = Callable[[int, bool], LayerConfig]
"""Layer `index`, which shares keys or not, without its norms."""


def _attention(
    read: Fields, types: Sequence[str], ropes: Mapping[str, RopeConfig]
) -> dict[str, AttentionConfig]:
    """Local and global attention, before what Gemma 4 has of its own in global layers."""
    heads, head_dim = read.size("num_attention_heads"), read.size("head_dim")
    kv = OwnKV(heads=read.size("num_key_value_heads"))
    window = read.size("sliding_window") if LOCAL in types else None
    read.take("sliding_window")
    global_ = AttentionConfig(
        heads=heads, head_dim=head_dim, kv=kv, rope=ropes[GLOBAL], query_scale=1.0
    )
    return {GLOBAL: global_, LOCAL: replace(global_, rope=ropes[LOCAL], window=window)}


def _gemma3n_layers(read: Fields, types: Sequence[str]) -> _Layer:
    count = len(types)
    attention = _attention(read, types, read_ropes(read))
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
        ffw = Dense(hidden=hidden[index], cutoff=cutoff)
        return LayerConfig(attention=attention[types[index]], ffw=ffw)

    return layer


def _gemma4_layers(read: Fields, types: Sequence[str]) -> _Layer:
    told = read.table("rope_parameters")
    ropes = read_ropes(Fields({"rope_parameters": told})) if told else _ROPES
    attention = _attention(read, types, ropes)
    tied = _read_bool(read, "attention_k_eq_v")
    heads = read.size_or_none("num_global_key_value_heads")
    global_ = replace(attention[GLOBAL], head_dim=read.size("global_head_dim"))
    # Heads of their own in number go with one projection only.
    if tied and heads:
        global_ = replace(global_, kv=OwnKV(heads=heads))
    global_ = _own(read, types, attention[GLOBAL], global_)
    if tied and isinstance(global_.kv, OwnKV):
        global_ = replace(global_, kv=KeyIsValue(heads=global_.kv.heads))
    attention[GLOBAL] = global_
    hidden, wider = read.size("intermediate_size"), _read_bool(read, "use_double_wide_mlp")
    moe = _read_moe(read)

    def layer(index: int, shares: bool) -> LayerConfig:
        dense = Dense(hidden=2 * hidden if shares and wider else hidden)
        ffw = dense if moe is None else DensePlusMoE(dense=dense, moe=moe)
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
        kv=shared.kv if heads is None else OwnKV(heads=heads),
    )


def _read_bool(read: Fields, key: str) -> bool:
    value = read.take(key)
    if not isinstance(value, bool):
        raise CheckpointError(f"its {key} must be true or false, got {short(value)}.")
    return value


def _read_moe(read: Fields) -> MoE | None:
    keys = ("num_experts", "top_k_experts", "moe_intermediate_size")
    enabled = read.take("enable_moe_block")
    if not enabled:
        for key in keys:
            read.take(key)
        return None
    experts, chosen, hidden = (read.size(key) for key in keys)
    return MoE(experts=experts, chosen=chosen, hidden=hidden)


# What transformers takes where Gemma 4 says nothing of rotation.
_ROPES = {
    GLOBAL: RopeConfig(theta=1_000_000.0, proportion=0.25),
    LOCAL: RopeConfig(theta=10_000.0),
}


def is_newer(config: ModelConfig) -> bool:
    """Whether a model is of these kinds, if of any."""
    return any(layer.attention.v_norm is not None for layer in config.layers)


def write_newer(config: ModelConfig, context_length: int | None) -> dict[str, Any]:
    """The keys that describe a model; reading them shows whether they say it all."""
    types = [LOCAL if layer.attention.window else GLOBAL for layer in config.layers]
    first = {types[index]: index for index in reversed(range(len(types)))}
    if GLOBAL not in first:
        raise CheckpointError("transformers knows no such model without a layer that sees all.")
    far = config.layers[first[GLOBAL]].attention
    near = config.layers[first.get(LOCAL, first[GLOBAL])].attention
    shared = sum(isinstance(layer.attention.kv, SharedKV) for layer in config.layers)
    per_layer = config.per_layer
    ropes = {GLOBAL: rope_parameters_of(far.rope), LOCAL: rope_parameters_of(near.rope)}
    data: dict[str, Any] = {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": near.heads,
        "num_key_value_heads": config.kv_heads(first.get(LOCAL, first[GLOBAL])),
        "head_dim": near.head_dim,
        "hidden_activation": ACTIVATION,
        "rms_norm_eps": config.final_norm.epsilon,
        "sliding_window": near.window or 512,
        "layer_types": types,
        "num_kv_shared_layers": shared,
        "rope_parameters": ropes,
        "final_logit_softcapping": config.final_softcap,
        "vocab_size_per_layer_input": per_layer.vocab if per_layer else config.vocab,
        "hidden_size_per_layer_input": per_layer.dim if per_layer else 0,
        "max_position_embeddings": context_length or 32_768,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "initializer_range": 0.02,
    }
    if isinstance(config.stream, AltUp):
        return _named("gemma3n_text", data | _write_gemma3n(config, config.stream, far, near))
    return _named("gemma4_text", data | _write_gemma4(config, first[GLOBAL], far))


def _sees_any_images(config: ModelConfig) -> bool:
    return any(layer.attention.visibility == "causal_or_same_block" for layer in config.layers)


def _named(kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": kind, "architectures": [_ARCHITECTURES[kind]]} | dict(data)


def _dense(layer: LayerConfig) -> Dense:
    return layer.ffw if isinstance(layer.ffw, Dense) else layer.ffw.dense


def _write_gemma3n(
    config: ModelConfig, stream: AltUp, far: AttentionConfig, near: AttentionConfig
) -> dict[str, Any]:
    if config.final_softcap is None:
        raise CheckpointError(
            "transformers caps the logits of every Gemma 3n, this model does not. With "
            "final_softcap=30.0 in its config it is what they load."
        )
    dense = [_dense(layer) for layer in config.layers]
    return {
        "intermediate_size": [ffw.hidden for ffw in dense],
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


def _write_gemma4(config: ModelConfig, global_: int, far: AttentionConfig) -> dict[str, Any]:
    sharing = [layer for layer in config.layers if isinstance(layer.attention.kv, SharedKV)]
    hidden = _dense(config.layers[0]).hidden
    data: dict[str, Any] = {
        "intermediate_size": hidden,
        "use_double_wide_mlp": any(_dense(layer).hidden == 2 * hidden for layer in sharing),
        "global_head_dim": far.head_dim,
        "num_global_key_value_heads": config.kv_heads(global_),
        "attention_k_eq_v": isinstance(config.layers[global_].attention.kv, KeyIsValue),
        "use_bidirectional_attention": "vision" if _sees_any_images(config) else None,
        "enable_moe_block": False,
    }
    ffw = config.layers[0].ffw
    if isinstance(ffw, DensePlusMoE):
        data |= {
            "enable_moe_block": True,
            "num_experts": ffw.moe.experts,
            "top_k_experts": ffw.moe.chosen,
            "moe_intermediate_size": ffw.moe.hidden,
        }
    return data
