"""Constraints that most formats share: storage of weights, and the layers that a model may have."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from equigemma import variants
from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._keymap import fill, leaf_shapes, leaves
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    OwnKVConfig,
    PlainStreamConfig,
    SharedKVConfig,
)
from equigemma.nn import Transformer


class Uniform(NamedTuple):
    """The parts of a model whose layers differ in window and rotation at most."""

    first: LayerConfig
    attention: AttentionConfig
    """Of the first layer."""
    kv_heads: int
    hidden: int
    local: AttentionConfig | None
    """Of the first layer with a window."""
    global_: AttentionConfig | None
    """Of the first layer without."""


def uniform(config: ModelConfig) -> Uniform:
    """The parts of `config`, taken from its first layer; the others are not compared with it.

    **Raises:** `CheckpointError` if it has a part that Gemma 1 to 3 do not have.
    """
    first = config.layers[0]
    kv, ffw = first.attention.kv, first.ffw
    if not isinstance(kv, OwnKVConfig) or not isinstance(ffw, FeedForwardConfig):
        raise CheckpointError(f"this format cannot describe layers with {kv} and {ffw}.")
    if config.stream != PlainStreamConfig():
        raise CheckpointError(f"this format cannot describe {config.stream}.")
    attentions = [layer.attention for layer in config.layers]
    return Uniform(
        first,
        first.attention,
        kv.heads,
        ffw.hidden_dim,
        next((attention for attention in attentions if attention.window is not None), None),
        next((attention for attention in attentions if attention.window is None), None),
    )


def is_newer(config: ModelConfig) -> bool:
    """Whether a model is a Gemma 3n or 4, if it is any of them."""
    return any(layer.attention.v_norm is not None for layer in config.layers)


def is_gemma2_without_post_norms(config: ModelConfig) -> bool:
    """Whether a model is a VaultGemma: no norm after a sub-layer, as in Gemma 1, which differs in
    that it has no soft caps, no windows, and queries scaled by the size of a head.
    """
    attentions = [layer.attention for layer in config.layers]
    like_gemma1 = config.final_softcap is None and all(
        attention.softcap is None
        and attention.window is None
        and attention.query_scale == attention.head_dim**-0.5
        for attention in attentions
    )
    has_post_norm = config.layers[0].post_norm is not None
    return not (has_post_norm or is_newer(config) or like_gemma1)


def dense_of(layer: LayerConfig) -> FeedForwardConfig:
    """The feed-forward of a layer, or the part of it that has no experts."""
    return layer.ffw if isinstance(layer.ffw, FeedForwardConfig) else layer.ffw.dense


def split_layout(config: ModelConfig) -> ModelConfig:
    """The same model with queries apart from keys and values, and gates stored as `[C F D]`.

    Other formats hold every projection as a matrix of its own; this is the layout they are read in.
    Weights that no layer reads are left out.
    """

    def split(layer: LayerConfig) -> LayerConfig:
        attention = replace(layer.attention, qkv_axes="NDH,CKDH")
        is_dense = isinstance(layer.ffw, FeedForwardConfig)
        ffw = replace(layer.ffw, gate_axes="CFD") if is_dense else layer.ffw
        return replace(layer, attention=attention, ffw=ffw)

    lean = _lean(config)
    return replace(lean, layers=tuple(map(split, lean.layers)))


def official_layout(config: ModelConfig) -> ModelConfig:
    """The same model stored as DeepMind's files store it.

    A variant that they publish has the axes of its table; any other model keeps its own, but for
    one rule of theirs: with as many key/value heads as query heads, all projections are one.
    """
    for name in variants.names():
        known = replace(variants.get(name), vocab=config.vocab)
        known = known if config.vision is not None else known.text_only()
        if split_layout(known) == split_layout(config):
            return known
    layers = tuple(
        replace(
            layer,
            attention=replace(
                layer.attention,
                qkv_axes="CNDH"
                if layer.attention.kv == OwnKVConfig(heads=layer.attention.heads)
                else layer.attention.qkv_axes,
            ),
        )
        for layer in config.layers
    )
    return replace(config, layers=layers)


def text_only(model: Transformer) -> Transformer:
    """The same model without a vision tower."""
    return fill(skeleton(model.config.text_only()), dict(leaves(model)))


def without_unused(model: Transformer) -> Transformer:
    """The same model without the weights that no layer reads."""
    return fill(skeleton(_lean(model.config)), dict(leaves(model)))


def _lean(config: ModelConfig) -> ModelConfig:
    def lean(layer: LayerConfig) -> LayerConfig:
        kv = layer.attention.kv
        kv = SharedKVConfig(layer=kv.layer) if isinstance(kv, SharedKVConfig) else kv
        return replace(layer, attention=replace(layer.attention, kv=kv))

    return replace(config, layers=tuple(map(lean, config.layers)))


def relayout(model: Transformer, target: ModelConfig) -> Transformer:
    """The same model with its weights stored as `target`, the same config, says.

    What changes is read into memory. Weights that no layer reads are zeros, if `model` has none.
    """
    weights: dict[str, Any] = dict(leaves(model))
    dtype = weights["embedding.weight"].dtype
    for path, shape in leaf_shapes(skeleton(target)).items():
        if ".unused." in path and path not in weights:
            weights[path] = np.zeros(shape, dtype)
    for index, (ours, theirs) in enumerate(zip(model.config.layers, target.layers, strict=True)):
        projection = f"layers.{index}.attention.projection."
        q, kv, qkv = (f"{projection}{name}.weight" for name in ("q", "kv", "qkv"))
        if ours.attention.qkv_axes != theirs.attention.qkv_axes:
            if theirs.attention.qkv_axes == "CNDH":
                parts = np.asarray(weights.pop(q))[None], np.asarray(weights.pop(kv))
                weights[qkv] = np.concatenate(parts)
            else:
                weights[q], weights[kv] = np.split(np.asarray(weights.pop(qkv)), [1])
                weights[q] = weights[q][0]
        if gate_axes(model.config, index) != gate_axes(target, index):
            gate = f"layers.{index}.ffw.gate.weight"
            weights[gate] = np.asarray(weights[gate]).swapaxes(-1, -2)
    return fill(skeleton(target), weights)


def gate_axes(config: ModelConfig, index: int) -> str:
    """How layer `index` stores one of gate and up projection: `"F D"` or `"D F"`."""
    ffw = config.layers[index].ffw
    return "F D" if isinstance(ffw, FeedForwardConfig) and ffw.gate_axes == "CFD" else "D F"


def check_described(config: ModelConfig, described: ModelConfig, kind: str) -> None:
    """Refuses a description from which another model would be read than `config`.

    **Raises:** `CheckpointError` naming the first few differences.
    """
    lost = list(_differences(split_layout(config), described))
    if lost:
        raise CheckpointError(
            f"as a model of the kind {kind} it would be another one: {'; '.join(lost[:5])}."
        )


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """Every field in which two configs differ: `layers[3].attention.window: 5, not 7`."""
    if is_dataclass(ours) and type(ours) is type(theirs):
        for field in fields(ours):
            child = f"{name}.{field.name}" if name else field.name
            yield from _differences(getattr(ours, field.name), getattr(theirs, field.name), child)
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(our, their, f"{name}[{index}]")
    elif ours != theirs:
        yield f"{name}: {theirs!r}, not {ours!r}"
