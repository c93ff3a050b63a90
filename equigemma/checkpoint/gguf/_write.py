"""Models to GGUF files, which llama.cpp runs: in 32 or 16 bits, or packed to 8 (Q8_0).

The `gguf` library lays the file out and packs; tensors are handed to it one at a time.
"""

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._extras import Extras
from equigemma.checkpoint.core._keymap import Assignment, Rule, leaves, plan
from equigemma.checkpoint.core._layout import text_only
from equigemma.checkpoint.core._stored import Progress, Stored, as_numpy
from equigemma.checkpoint.core._tokenizer_files import VocabularyTokenizer
from equigemma.checkpoint.gguf._config import DENSE, EMBEDDING
from equigemma.checkpoint.gguf._leaves import file_leaves, with_full_table
from equigemma.checkpoint.gguf._metadata import (
    describe_config,
    describe_origin,
    describe_vocabulary,
)
from equigemma.checkpoint.gguf._rules import rules
from equigemma.checkpoint.gguf._vision import CLIP, TEXT, describe_vision, vision_rules
from equigemma.config import ModelConfig
from equigemma.embedding import Embedder
from equigemma.nn import Transformer


Q8_0 = "q8_0"
# Name of each type in the library, and the number by which a file says what most of it is.
_TYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32), Q8_0: ("Q8_0", 7)}
# Numbers packed at a time: few enough for the processor's cache, and whole blocks.
_PIECE = 1 << 17


class _Content(NamedTuple):
    """What one file is to hold."""

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    weights: Mapping[str, Any]
    assignments: list[Assignment]
    types: Mapping[str, str]
    """How each leaf is stored."""

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(len(entry.keys) * self.part_size(entry) for entry in self.assignments)

    def part_size(self, entry: Assignment) -> int:
        """Bytes of each tensor that a leaf becomes."""
        return _packed_bytes(math.prod(entry.key_shape), self.types[entry.path])


def write_gguf(
    model: Transformer,
    path: Path,
    *,
    tower: Path | None = None,
    dtype: str | None,
    tokenizer: VocabularyTokenizer,
    extras: Extras,
    name: str,
    progress: Progress | None,
    embedder: Embedder | None = None,
) -> None:
    """Writes one file with weights, config and vocabulary, and one with the vision tower.

    **Arguments:** `tower`: where that goes, if the model has one. `dtype`: of all matrices: a
    dtype's name, or `"q8_0"`; None keeps that of each. Scales of norms are float32, as llama.cpp
    wants them. `name`: what the model is called, unless `extras` say. `embedder`: what `model` is
    of, if its linear maps are to come along.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Writing .gguf files needs the package gguf, which is not installed: "
            'pip install "equigemma[gguf]".'
        ) from error
    model = with_full_table(model)
    metadata = describe_origin(extras, name)
    words = describe_vocabulary(tokenizer.vocabulary, tokenizer.special, model.config.vocab)
    contents = [_text(text_only(model), path, dtype, extras, metadata | words, embedder)]
    if tower is not None:
        contents.append(_tower(model, tower, dtype, metadata, contents[0]))
    total, done = sum(content.size for content in contents), 0
    for content in contents:
        _write_file(content, done, total, progress)
        done += content.size


def _text(
    model: Transformer,
    path: Path,
    dtype: str | None,
    extras: Extras,
    words: dict[str, Any],
    embedder: Embedder | None,
) -> _Content:
    weights = file_leaves(model)
    assignments = _plan(model.config, weights)
    if embedder is not None:
        weights |= _dense(embedder)
        assignments += _plan_dense(weights)
        words = words | _around(embedder)
    config = describe_config(
        model.config, _shapes(assignments), extras.context_length, weights.get("factors")
    )
    types = {entry.path: _type(entry, dtype, weights) for entry in assignments}
    metadata = words | config | _packing(types, "embedding.weight")
    architecture = next(key for key in config if key.endswith(".block_count")).split(".")[0]
    return _Content(path, architecture, metadata, weights, assignments, types)


def _tower(
    model: Transformer, path: Path, dtype: str | None, origin: Mapping[str, Any], text: _Content
) -> _Content:
    config = model.config
    assert config.vision is not None  # or there would be no path
    if text.architecture != TEXT:
        raise CheckpointError(
            f"llama.cpp knows no {text.architecture} with such a vision tower, only {TEXT}; a "
            "folder can hold it."
        )
    weights = {name: leaf for name, leaf in leaves(model) if name.startswith("vision.")}
    shapes = {name: leaf.shape for name, leaf in weights.items()}
    assignments = plan(shapes, vision_rules(config.vision))
    types = {entry.path: _type_of_tower(entry, dtype, weights) for entry in assignments}
    tokens = text.metadata["tokenizer.ggml.tokens"]
    metadata = {
        **{key: value for key, value in origin.items() if key.startswith("general.")},
        "general.type": "mmproj",
        **describe_vision(config, _shapes(assignments), tokens),
        **_packing(types, "vision.tower.layers.0.up.linear.weight"),
    }
    return _Content(path, CLIP, metadata, weights, assignments, types)


def _shapes(assignments: list[Assignment]) -> dict[str, tuple[int, ...]]:
    return {key: entry.key_shape for entry in assignments for key in entry.keys}


def _packing(types: Mapping[str, str], path: str) -> dict[str, Any]:
    """The metadata about types. `path`: of a leaf that is stored like most of them."""
    version = {"general.quantization_version": 2} if Q8_0 in types.values() else {}
    return {"general.file_type": _TYPES[types[path]][1]} | version


def _write_file(content: _Content, before: int, total: int, progress: Progress | None) -> None:
    """Writes one of the files, of which `before` bytes in others are written already."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(content.path, content.architecture)
    for key, value in content.metadata.items():
        _add(writer, key, value)
    for entry in content.assignments:
        kind = GGMLQuantizationType[_TYPES[content.types[entry.path]][0]]
        for key in entry.keys:
            size = content.part_size(entry)
            writer.add_tensor_info(key, entry.key_shape, np.dtype(np.float32), size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = before
        for entry in content.assignments:
            done += _write_leaf(writer, entry, content.types[entry.path], content.weights)
            if progress is not None:
                progress(done, total, entry.path)
    finally:
        writer.close()


def _plan(config: ModelConfig, weights: Mapping[str, Any]) -> list[Assignment]:
    try:
        return plan({path: leaf.shape for path, leaf in weights.items()}, rules(config))
    except CheckpointError as error:
        raise CheckpointError(
            "this model has weights that no Gemma has which llama.cpp knows; a folder can hold it."
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
    metadata: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": bool(embedder.settings.prefix),
        "tokenizer.ggml.add_eos_token": bool(embedder.settings.suffix),
    }
    for name, leaf in _dense(embedder).items():
        sizes = zip(("in", "out"), leaf.shape, strict=True)
        metadata |= {f"{EMBEDDING}.{name}_feat_{side}": size for side, size in sizes}
    return metadata


def _write_leaf(writer: Any, entry: Assignment, kind: str, weights: Mapping[str, Any]) -> int:
    """Writes the tensors of a leaf; gives their bytes."""
    if kind == Q8_0 and _in_blocks(weights[entry.path]):
        packed = _packed_blocks(*weights[entry.path].blocks())
        for part in packed.reshape(len(entry.keys), -1):
            writer.write_tensor_data(part)
        return packed.nbytes
    dtype = np.dtype(np.float32) if kind == Q8_0 else jnp.dtype(kind)
    leaf, written = as_numpy(weights, entry.path, dtype), 0
    for part in entry.parts(leaf):
        array = np.ascontiguousarray(entry.part_to_theirs(part))
        packed = _pack(array) if kind == Q8_0 else array.view(np.uint8)
        writer.write_tensor_data(packed)
        written += packed.nbytes
    return written


def _type(entry: Assignment, dtype: str | None, weights: Mapping[str, Any]) -> str:
    """How a leaf is stored."""
    kept = Q8_0 if _in_blocks(weights[entry.path]) else np.dtype(weights[entry.path].dtype).name
    kind = kept if dtype is None else dtype
    if kind not in _TYPES:
        raise CheckpointError(
            f"{entry.path} has dtype {kind}; a .gguf is written in {', '.join(_TYPES)}."
        )
    block = 32
    if len(entry.key_shape) == 1 or kind == Q8_0 and entry.key_shape[-1] % block:
        return "float32"
    return kind


def _type_of_tower(entry: Assignment, dtype: str | None, weights: Mapping[str, Any]) -> str:
    """The same for a vision tower, of which llama.cpp does not take every type."""
    kind = _type(entry, dtype, weights)
    if entry.path in ("vision.tower.patches.linear.weight", "vision.tower.positions"):
        return "float32"
    # It is transposed there, which no packed matrix can be, and one of bfloat16 not everywhere.
    is_turned = entry.path == "vision.projection.weight"
    # Rows of 4304 numbers, a third of the tower, are no whole blocks: half of what they would take.
    is_odd = kind != Q8_0 and len(entry.key_shape) > 1
    if dtype == Q8_0 and (is_turned or is_odd):
        return "float16"
    return "float32" if is_turned and kind == "bfloat16" else kind


def _in_blocks(leaf: Any) -> bool:
    """Whether a leaf is no array of floats, and comes in the blocks of Q8_0."""
    return leaf.dtype == np.int8 and isinstance(leaf, Stored) and leaf.blocks is not None


def _packed_blocks(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The bytes of Q8_0, one row for each block."""
    blocks = np.empty((scales.size, 34), np.uint8)
    blocks[:, :2] = np.ascontiguousarray(scales).reshape(-1, 1).view(np.uint8)
    blocks[:, 2:] = integers.reshape(-1, 32).view(np.uint8)
    return blocks


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
