"""Models to GGUF files, which llama.cpp runs: in 32 or 16 bits, or packed to 8 (Q8_0).

The `gguf` library lays the file out and packs; tensors are handed to it one at a time.
"""

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from equigemma.checkpoint._errors import CheckpointError
from equigemma.checkpoint._extras import Extras
from equigemma.checkpoint._gguf_config import DENSE, EMBEDDING
from equigemma.checkpoint._gguf_describe import (
    describe_config,
    describe_origin,
    describe_vocabulary,
)
from equigemma.checkpoint._gguf_leaves import file_leaves, with_full_table
from equigemma.checkpoint._gguf_rules import rules
from equigemma.checkpoint._hf_tokenizer import VocabularyTokenizer
from equigemma.checkpoint._keymap import Assignment, Rule, leaves, plan
from equigemma.checkpoint._stored import Progress, as_numpy
from equigemma.config import ModelConfig
from equigemma.embedding import Embedder
from equigemma.nn import Transformer


Q8_0 = "q8_0"
# Name of each type in the library, and the number by which a file says what most of it is.
_TYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32), Q8_0: ("Q8_0", 7)}
# Numbers packed at a time: few enough for the processor's cache, and whole blocks.
_PIECE = 1 << 17


def write_gguf(
    model: Transformer,
    path: Path,
    *,
    dtype: str | None,
    tokenizer: VocabularyTokenizer,
    extras: Extras,
    name: str,
    progress: Progress | None,
    embedder: Embedder | None = None,
) -> None:
    """Writes one file with weights, config and vocabulary.

    **Arguments:** `dtype`: of all matrices: a dtype's name, or `"q8_0"`; None keeps that of each.
    Scales of norms are float32, as llama.cpp wants them. `name`: what the model is called, unless
    `extras` say. `embedder`: what `model` is of, if its linear maps are to come along.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError as error:
        raise ImportError(
            "Writing .gguf files needs the package gguf, which is not installed: "
            'pip install "equigemma[gguf]".'
        ) from error
    model = with_full_table(model)
    weights = file_leaves(model)
    assignments = _plan(model.config, weights)
    if embedder is not None:
        weights |= _dense(embedder)
        assignments += _plan_dense(weights)
    shapes = {key: entry.key_shape for entry in assignments for key in entry.keys}
    metadata = describe_origin(extras, name)
    factors = weights.get("factors")
    metadata |= describe_config(model.config, shapes, extras.context_length, factors)
    metadata |= describe_vocabulary(tokenizer.vocabulary, tokenizer.special, model.config.vocab)
    if embedder is not None:
        metadata |= _around(embedder)
    chosen = {entry.path: _type(entry, dtype, weights) for entry in assignments}
    metadata["general.file_type"] = _TYPES[chosen["embedding.weight"]][1]
    if Q8_0 in chosen.values():
        metadata["general.quantization_version"] = 2

    architecture = next(key for key in metadata if key.endswith(".block_count")).split(".")[0]
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for entry in assignments:
        kind = GGMLQuantizationType[_TYPES[chosen[entry.path]][0]]
        for key in entry.keys:
            size = _packed_bytes(math.prod(entry.key_shape), chosen[entry.path])
            writer.add_tensor_info(key, entry.key_shape, np.dtype(np.float32), size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, assignments, chosen, weights, progress)
    finally:
        writer.close()


def _plan(config: ModelConfig, weights: Mapping[str, Any]) -> list[Assignment]:
    try:
        return plan({path: leaf.shape for path, leaf in weights.items()}, rules(config))
    except CheckpointError as error:
        raise CheckpointError(
            "a .gguf is written of the text part of a Gemma, and this model has weights that none "
            "of them has; a folder can hold it."
        ) from error


def _dense(embedder: Embedder) -> dict[str, Any]:
    """The linear maps of an embedder by the names that they have in a file."""
    maps, width = leaves(embedder.dense), embedder.model.config.width
    if len(maps) != len(DENSE) or maps[-1][1].shape[-1] != width:
        sizes = ", ".join(str(leaf.shape[-1]) for _, leaf in maps) or "none"
        raise CheckpointError(
            f"llama.cpp wants {len(DENSE)} linear maps after such a model, the last back to its "
            f"width of {width}; here they lead to {sizes}. A folder can hold it."
        )
    return {name: leaf for name, (_, leaf) in zip(DENSE, maps, strict=True)}


def _plan_dense(weights: Mapping[str, Any]) -> list[Assignment]:
    shapes = {name: weights[name].shape for name in DENSE}
    return plan(shapes, (Rule(name, f"{name}.weight", axes="O D -> D O") for name in DENSE))


def _around(embedder: Embedder) -> dict[str, Any]:
    """The metadata about what comes after the model and after texts."""
    metadata: dict[str, Any] = {"tokenizer.ggml.add_eos_token": bool(embedder.suffix)}
    for name, leaf in _dense(embedder).items():
        sizes = zip(("in", "out"), leaf.shape, strict=True)
        metadata |= {f"{EMBEDDING}.{name}_feat_{side}": size for side, size in sizes}
    return metadata


def _write_tensors(
    writer: Any,
    assignments: list[Assignment],
    chosen: Mapping[str, str],
    weights: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    total = sum(
        len(entry.keys) * _packed_bytes(math.prod(entry.key_shape), chosen[entry.path])
        for entry in assignments
    )
    done = 0
    for entry in assignments:
        kind = chosen[entry.path]
        dtype = np.dtype(np.float32) if kind == Q8_0 else jnp.dtype(kind)
        leaf = as_numpy(weights, entry.path, dtype)
        for part in entry.parts(leaf):
            array = np.ascontiguousarray(entry.part_to_theirs(part))
            packed = _pack(array) if kind == Q8_0 else array.view(np.uint8)
            writer.write_tensor_data(packed)
            done += packed.nbytes
        if progress is not None:
            progress(done, total, entry.path)


def _type(entry: Assignment, dtype: str | None, weights: Mapping[str, Any]) -> str:
    """How a leaf is stored."""
    kind = np.dtype(weights[entry.path].dtype).name if dtype is None else dtype
    if kind not in _TYPES:
        raise CheckpointError(
            f"{entry.path} has dtype {kind}; a .gguf is written in {', '.join(_TYPES)}."
        )
    block = 32
    if len(entry.key_shape) == 1 or kind == Q8_0 and entry.key_shape[-1] % block:
        return "float32"
    return kind


def _packed_bytes(count: int, kind: str) -> int:
    # A block of 32 numbers is one scale in 16 bits and 32 times 8 bits.
    return count // 32 * 34 if kind == Q8_0 else count * jnp.dtype(kind).itemsize


def _pack(array: np.ndarray) -> np.ndarray:
    """The bytes of Q8_0, packed piece by piece: only the result is ever held in full."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    flat = array.reshape(-1)
    out = np.empty(_packed_bytes(flat.size, Q8_0), np.uint8)

    def pack(start: int) -> None:
        piece = quantize(flat[None, start : start + _PIECE], GGMLQuantizationType.Q8_0)
        at = _packed_bytes(start, Q8_0)
        out[at : at + piece.size] = piece[0]

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(pack, range(0, flat.size, _PIECE)))
    return out


def _add(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case None:
            pass
        case _:
            raise TypeError(f"{key} has a value of type {type(value).__name__}.")
