"""Keys of `config.json` that Gemma 3n and 4 share.

What each has of its own is in `_config_gemma3n.py` and `_config_gemma4.py`, which call this.

**Source:** transformers `models/gemma3n/configuration_gemma3n.py`, `gemma4`, `gemma4_unified`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._fields import Fields, short
from equigemma.checkpoint.hf._options import (
    ACTIVATION,
    GLOBAL,
    LOCAL,
    expect_fixed,
    rope_parameters_of,
)
from equigemma.config import (
    AltUpConfig,
    AttentionConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
    OwnKVConfig,
    PerLayerConfig,
    PlainStreamConfig,
    RopeConfig,
    SharedKVConfig,
)


Layer = Callable[[int, bool], LayerConfig]
"""Layer `index`, which shares keys or not, without its norms."""


def read_model(
    read: Fields,
    types: Sequence[str],
    layer: Layer,
    stream: AltUpConfig | PlainStreamConfig = PlainStreamConfig(),
) -> ModelConfig:
    """The model that the keys describe, with these layers and this stream."""
    expect_fixed(read)
    read.expect("hidden_activation", ACTIVATION)
    norm = NormConfig(epsilon=read.number("rms_norm_eps", 1e-6), offset=0.0)
    layers = (
        _with_norms(layer(index, owner != index), norm, None if owner == index else owner)
        for index, owner in enumerate(_owners(read, types))
    )
    return ModelConfig(
        vocab=read.size("vocab_size"),
        width=read.size("hidden_size"),
        layers=tuple(layers),
        final_norm=norm,
        final_softcap=read.number_or_none("final_logit_softcapping"),
        per_layer=_read_per_layer(read, norm),
        stream=stream,
    )


def read_attention(
    read: Fields, types: Sequence[str], ropes: Mapping[str, RopeConfig]
) -> dict[str, AttentionConfig]:
    """Attention of global and local layers, which differ in rotation and window alone."""
    heads, head_dim = read.size("num_attention_heads"), read.size("head_dim")
    kv = OwnKVConfig(heads=read.size("num_key_value_heads"))
    window = read.size("sliding_window") if LOCAL in types else None
    read.take("sliding_window")
    global_ = AttentionConfig(
        heads=heads, head_dim=head_dim, kv=kv, rope=ropes[GLOBAL], query_scale=1.0
    )
    return {GLOBAL: global_, LOCAL: replace(global_, rope=ropes[LOCAL], window=window)}


def _owners(read: Fields, types: Sequence[str]) -> list[int]:
    """The layer whose keys each attends to: itself, or the last of its type before sharing."""
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
        kv=layer.attention.kv if owner is None else SharedKVConfig(layer=owner),
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


def write_model(
    kind: str, architecture: str, config: ModelConfig, context_length: int | None
) -> dict[str, Any]:
    """The keys that describe a model of either generation."""
    far = config.layers[first_global(config)].attention
    near = config.layers[first_local(config)].attention
    shared = sum(isinstance(layer.attention.kv, SharedKVConfig) for layer in config.layers)
    per_layer = config.per_layer
    ropes = {GLOBAL: rope_parameters_of(far.rope), LOCAL: rope_parameters_of(near.rope)}
    return {
        "model_type": kind,
        "architectures": [architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": near.heads,
        "num_key_value_heads": config.kv_heads(first_local(config)),
        "head_dim": near.head_dim,
        "hidden_activation": ACTIVATION,
        "rms_norm_eps": config.final_norm.epsilon,
        "sliding_window": near.window or 512,
        "layer_types": [LOCAL if layer.attention.window else GLOBAL for layer in config.layers],
        "num_kv_shared_layers": shared,
        "rope_parameters": ropes,
        "final_logit_softcapping": config.final_softcap,
        "vocab_size_per_layer_input": per_layer.vocab if per_layer else config.vocab,
        "hidden_size_per_layer_input": per_layer.dim if per_layer else 0,
        "max_position_embeddings": context_length or 32_768,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.lm_head == "tied",
        "use_cache": True,
        "initializer_range": 0.02,
    }


def first_global(config: ModelConfig) -> int:
    """The first layer that sees all.

    **Raises:** `CheckpointError` if there is none.
    """
    for index, layer in enumerate(config.layers):
        if layer.attention.window is None:
            return index
    raise CheckpointError("transformers knows no such model without a layer that sees all.")


def first_local(config: ModelConfig) -> int:
    """The first layer with a window; the first that sees all where none has."""
    windows = (index for index, layer in enumerate(config.layers) if layer.attention.window)
    return next(windows, first_global(config))
