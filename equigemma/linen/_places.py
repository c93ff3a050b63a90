"""Modules of this library, by the names of DeepMind's.

A module that holds one weight is where the weight is; larger modules, and those without weights,
are named here. Those of the vision encoder are in `_places_vision.py`.
"""

from collections.abc import Iterator

from equigemma import nn
from equigemma.checkpoint.gemma import names
from equigemma.config import AltUpConfig
from equigemma.linen import _values as values
from equigemma.linen._place import Place, module_at
from equigemma.linen._places_vision import vision_places
from equigemma.nn import DenseAndExperts, SharedKVAttention


def places(model: nn.Transformer) -> Iterator[Place]:
    """All modules of DeepMind's that `model` has."""
    yield from _weights(model)
    yield from _embedder(model)
    yield from vision_places(model)
    for index in range(len(model.layers)):
        yield from _attention(model, index)
        yield from _feed_forward(model, index)
        yield from _streams(model, index)


def _weights(model: nn.Transformer) -> Iterator[Place]:
    """Projections and norms that hold a weight, but for those that are said below."""
    for path, key in names(model).items():
        source, scope = path.rpartition(".")[0], key.rpartition("/")[0]
        part = source.rpartition(".")[2]
        if source.startswith(("vision.", "embedding")) or source == "per_layer.projection":
            continue
        if part in ("gate", "down") and ".ffw" in source or part == "logits":
            continue
        if part in ("kv", "qkv"):
            yield Place(source, scope, values.parts_first)
        elif part.endswith("norm") or isinstance(module_at(model, source), nn.AbstractEinsum):
            yield Place(source, scope)


def _embedder(model: nn.Transformer) -> Iterator[Place]:
    for method, value in (("encode", values.result), ("decode", values.as_input)):
        yield Place("embedding", "embedder", value, method=method, source_method=method)
    if model.per_layer is not None:
        parallel = isinstance(model.config.stream, AltUpConfig)
        name = "per_layer_input_projection" if parallel else "per_layer_model_projection"
        yield Place("per_layer.projection", f"embedder/{name}", values.scaled_projection)
        yield Place("per_layer", "embedder", method="encode_per_layer_input")


def _attention(model: nn.Transformer, index: int) -> Iterator[Place]:
    source, scope = f"layers.{index}.attention", f"layer_{index}/attn"
    attention_fn, attention = f"{source}.attention_fn", module_at(model, source)
    parallel = isinstance(model.config.stream, AltUpConfig)
    # From Gemma 3n on, keys and values are passed on also where there is no cache.
    if attention.config.v_norm is None:
        yield Place(source, scope, values.with_cache)
        yield Place(f"layers.{index}", f"layer_{index}", values.with_cache)
    else:
        block = values.with_keys_and_streams if parallel else values.with_keys
        yield Place(source, scope, values.with_keys, inner=attention_fn)
        yield Place(f"layers.{index}", f"layer_{index}", block, inner=attention_fn)
    if not parallel:
        yield Place(attention_fn, f"{scope}/attention_weights", values.attention_weights)
    if not isinstance(attention, SharedKVAttention):
        for name in ("query_norm", "key_norm", "value_norm"):
            norm = getattr(attention, name)
            # One with a scale is where the scale is.
            if norm is not None and norm.scale is None:
                yield Place(f"{source}.{name}", f"{scope}/{name}")
    elif attention.query_norm is not None and attention.query_norm.scale is None:
        yield Place(f"{source}.query_norm", f"{scope}/query_norm")
    if isinstance(attention, SharedKVAttention) and attention.unused is not None:
        kind = "k_einsum" if attention.unused.kv is None else "kv_einsum"
        yield Place(source, f"{scope}/{kind}", values.unused_kv)
        yield Place(source, f"{scope}/key_norm", values.unused_key_norm)
        yield Place(source, f"{scope}/value_norm", values.unused_value_norm)


def _feed_forward(model: nn.Transformer, index: int) -> Iterator[Place]:
    source, scope = f"layers.{index}.ffw", f"layer_{index}/mlp"
    if not isinstance(module_at(model, source), DenseAndExperts):
        yield from _gated(source, scope)
        return
    yield from _gated(f"{source}.dense", f"{scope}2")
    for part, name in (("norm", "router_norm"), ("logits", "router_logits")):
        router = f"{source}.router"
        yield Place(router, f"{scope}/{name}", values.within, inner=f"{router}.{part}")
    experts = f"{source}.experts"
    yield Place(experts, f"{scope}/gating_einsum", values.expert_weights("gate"))
    yield Place(experts, f"{scope}/linear", values.expert_weights("down"))
    yield Place(experts, scope)


def _gated(source: str, scope: str) -> Iterator[Place]:
    # There the projections have names of their own, and the scope of the whole.
    yield Place(f"{source}.gate", scope, name="Einsum_0")
    yield Place(f"{source}.down", scope, name="Einsum_1")
    yield Place(source, scope)


def _streams(model: nn.Transformer, index: int) -> Iterator[Place]:
    """What only layers of parallel streams have."""
    if not isinstance(model.config.stream, AltUpConfig):
        return
    source, scope = f"layers.{index}", f"layer_{index}"
    yield Place(f"{source}.laurel.right", f"{scope}/laurel")
    if model.per_layer is not None:
        yield Place(f"{source}.per_layer_gate", f"{scope}/per_layer_mapping")
    for method, name in (("predict",) * 2, ("correct",) * 2, ("scaled", "scale_corrected_output")):
        value = values.result if method == "scaled" else values.as_list
        yield Place(
            f"{source}.alternation", f"{scope}/altup", value, method=name, source_method=method
        )
