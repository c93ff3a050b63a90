"""The leaves of a model as GGUF files hold them: a few are joined, filled up, or not ours at all.

Nothing is read here: new leaves read those that they are made of when they are asked for.

**Source:** llama.cpp `src/models/gemma3n.cpp`, `gemma4.cpp` (`load_arch_tensors`) for the shapes.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._keymap import fill, leaf_shapes, leaves
from equigemma.checkpoint.core._layout import is_newer, without_unused
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.checkpoint.core._stored import Stored
from equigemma.checkpoint.gguf._config_gemma4 import factors_of
from equigemma.config import AltUpConfig, ModelConfig
from equigemma.nn import Transformer


_JOINED = ("stream.spread", "stream.gather")
"""Matrices of several streams, which are one tensor."""


def with_full_table(model: Transformer) -> Transformer:
    """The same model with a row for every token in its second embedding.

    Tokens that have none count as token 0, so its row is theirs.
    """
    model = without_unused(model)
    config = model.config
    missing = 0 if config.per_layer is None else config.vocab - config.per_layer.vocab
    if config.per_layer is None or not missing:
        return model
    if missing < 0:
        raise CheckpointError(
            f"its second embedding has {config.per_layer.vocab} rows, more than the {config.vocab} "
            "tokens that llama.cpp would read."
        )
    full = replace(config, per_layer=replace(config.per_layer, vocab=config.vocab))
    weights = dict(leaves(model))
    table = weights["per_layer.weight"]

    def read(dtype: np.dtype) -> np.ndarray:
        rows = np.asarray(table, dtype)
        return np.concatenate([rows, np.broadcast_to(rows[:1], (missing, *rows.shape[1:]))])

    shape = (config.vocab, *table.shape[1:])
    weights["per_layer.weight"] = Stored(shape, np.dtype(table.dtype), read)
    return fill(skeleton(full), weights)


def file_leaves(model: Transformer) -> dict[str, Any]:
    """What is written of a model: the leaves that rules name, by path."""
    weights = dict(leaves(model))
    config = model.config
    if isinstance(config.stream, AltUpConfig):
        _check_clip(weights, config.stream)
        weights |= _unused(config, _float_dtype(weights))
        for path in _JOINED:
            parts = [weights.pop(f"{path}.{index}.weight") for index in _others(config.stream)]
            shape = (len(parts), config.width, config.width)
            dtype = _float_dtype(weights)
            weights[path] = Stored(shape, dtype, partial(_stack, parts))
    factors = factors_of(config) if is_newer(config) else None
    if factors is not None:
        weights["factors"] = factors
    return weights


def _float_dtype(weights: Mapping[str, Any]) -> np.dtype:
    """That of the embedding, if it is not in 8 bits."""
    dtype = np.dtype(weights["embedding.weight"].dtype)
    return np.dtype(np.float32) if dtype == np.int8 else dtype


def file_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Shapes of what is read of a model."""
    shapes, stream = leaf_shapes(model), model.config.stream
    if isinstance(stream, AltUpConfig):
        for path in _JOINED:
            parts = [shapes.pop(f"{path}.{index}.weight") for index in _others(stream)]
            shapes[path] = (len(parts), *parts[0])
    return shapes


def from_file(weights: Mapping[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """Our leaves from those of `file_shapes`."""
    ours = dict(weights)
    if isinstance(config.stream, AltUpConfig):
        for path in _JOINED:
            whole = ours.pop(path)
            for index in _others(config.stream):
                part = Stored(whole.shape[1:], whole.dtype, partial(_take, whole, index))
                ours[f"{path}.{index}.weight"] = part
    return ours


def _others(stream: AltUpConfig) -> range:
    """The streams beside the first."""
    return range(stream.streams - 1)


def _stack(parts: list[Any], dtype: np.dtype) -> np.ndarray:
    return np.stack([np.asarray(part, dtype) for part in parts])


def _take(whole: Stored, index: int, dtype: np.dtype) -> np.ndarray:
    return whole.read(dtype)[index]


def _unused(config: ModelConfig, dtype: np.dtype) -> dict[str, Stored]:
    """Zeros for the keys and values that llama.cpp wants of layers without keys of their own."""
    zeros: dict[str, Stored] = {}
    for index, layer in enumerate(config.layers):
        if config.owner(index) != index:
            size, heads = layer.attention.head_dim, config.kv_heads(index)
            path = f"layers.{index}.attention.unused."
            for name, shape in (("kv", (2, heads, config.width, size)), ("key_norm", (size,))):
                zeros[path + name] = Stored(shape, dtype, partial(np.zeros, shape))
    return zeros


def _check_clip(weights: Mapping[str, Any], stream: AltUpConfig) -> None:
    """Refuses coefficients that are cut here: llama.cpp takes them as they are."""
    for path, leaf in weights.items():
        if ".alternation." in path and path.endswith(("prediction", "correction")):
            largest = abs(np.asarray(leaf, np.float32)).max()
            if stream.clip is not None and not largest <= stream.clip:
                raise CheckpointError(
                    f"{path} holds numbers up to {largest:.3g}, which count as {stream.clip:g}; "
                    "llama.cpp would not cut them."
                )
