"""Folders of this library's own, for quantized models: what no other format holds bit for bit.

One JSON file says what the model is and how each part is held; one file of `safetensors` has every
array under its path in the model.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from equigemma._prepare import prepare
from equigemma.checkpoint.core._config_json import config_from_json, config_to_json
from equigemma.checkpoint.core._errors import CheckpointError, about
from equigemma.checkpoint.core._json import read_json, write_json
from equigemma.checkpoint.core._keymap import Assignment, Rule, fill, leaf_shapes, leaves, plan
from equigemma.checkpoint.core._safetensors import WEIGHTS, opened
from equigemma.checkpoint.core._safetensors_write import Part, header
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.checkpoint.core._stored import Opened, Progress, Stored
from equigemma.checkpoint.core._tokenizer_files import FILES as TOKENIZER_FILES
from equigemma.checkpoint.core._tokenizer_files import read_tokenizer
from equigemma.config import ModelConfig
from equigemma.nn import DotProductAttention, JaxAttention, Transformer
from equigemma.quantize import quantization_of, quantize_like


SETTINGS = "equigemma.json"
_VERSION = 1
_DTYPES = {
    "I8": np.dtype(np.int8),
    "F16": np.dtype(np.float16),
    "BF16": jax.numpy.dtype("bfloat16"),
    "F32": np.dtype(np.float32),
}


def is_native(path: Path) -> bool:
    """Whether a folder is one of these."""
    return (path / SETTINGS).is_file()


def may_replace(path: Path) -> bool:
    """Whether something in a folder is what is written here, so that it may be replaced."""
    return path.is_file() and path.name in (SETTINGS, WEIGHTS, *TOKENIZER_FILES)


def write_native(model: Transformer, folder: Path, *, progress: Progress | None) -> None:
    """Writes into an empty folder. Every array keeps its dtype.

    **Raises:** `CheckpointError` if the model has a part that `load` would not know, such as an
    adapter.
    """
    held = quantization_of(model)
    arrays = dict(leaves(model))
    plain = {place: kind for place, kind in held.items() if not place.endswith(".base")}
    built = _skeleton(model.config, plain)
    shapes, expected = leaf_shapes(model), leaf_shapes(built)
    if shapes != expected:
        names = (name for name in shapes | expected if shapes.get(name) != expected.get(name))
        raise CheckpointError(
            f"it is not as prepare and quantize leave a model, first at {next(names)}; merge or "
            "remove adapters first, or write them with peft.save."
        )
    _check_built(model, built)
    write_json(
        folder / SETTINGS,
        {"version": _VERSION, "config": config_to_json(model.config), "parts": held},
    )
    parts = [
        Part(Assignment(path, (path,), Rule(path, path), leaf.shape), 0, path, np.dtype(leaf.dtype))
        for path, leaf in arrays.items()
    ]
    parts.sort(key=lambda part: -part.dtype.itemsize)
    done, total = 0, sum(part.nbytes for part in parts)
    with open(folder / WEIGHTS, "wb") as file:
        file.write(header(parts))
        for part in parts:
            np.ascontiguousarray(arrays[part.key]).reshape(-1).view(np.uint8).tofile(file)
            done += part.nbytes
            if progress is not None:
                progress(done, total, part.key)


def _check_built(model: Transformer, built: Transformer) -> None:
    """Refuses parts with numbers that are no arrays, such as a window, other than the config's.

    **Raises:** `CheckpointError`.
    """
    names = ("per_layer", "stream", "final_norm")
    pairs = [(name, getattr(model, name), getattr(built, name)) for name in names]
    layers = zip(model.layers, built.layers, strict=True)
    pairs += [(f"layers.{index}", *pair) for index, pair in enumerate(layers)]
    for path, ours, theirs in pairs:
        if _structure(ours) != _structure(theirs):
            raise CheckpointError(
                f"{path} is not what the model's config describes; build the model from its "
                "config, and put the weights into that."
            )


def _structure(part: Any) -> Any:
    # Who computes attention is not kept.
    return jax.tree.structure(
        jax.tree.map(lambda leaf: None if _is_attend(leaf) else leaf, part, is_leaf=_is_attend)
    )


def _is_attend(node: Any) -> bool:
    return isinstance(node, DotProductAttention | JaxAttention)


def open_native(folder: Path) -> Opened:
    """Model and tokenizer of a folder, of which only the headers are read.

    **Raises:** `CheckpointError` if something is missing, damaged, or not supported.
    """
    with about(folder):
        config, held = _settings(folder)
        try:
            model = _skeleton(config, held)
        except ValueError as error:
            raise CheckpointError(f"its {SETTINGS} is damaged: {error}.") from error
        with opened(folder / WEIGHTS) as file:
            found = {key: file.get_slice(key) for key in file.keys()}
            shapes = {key: tuple(part.get_shape()) for key, part in found.items()}
            stored = {key: part.get_dtype() for key, part in found.items()}
        plan(leaf_shapes(model), [Rule(path, path) for path in leaf_shapes(model)], shapes)
        exact = tuple(f"{place}." for place in held)
        values = {}
        for path, leaf in leaves(model):
            is_exact = path.startswith(exact)
            kind = _DTYPES.get(stored[path])
            if kind is None or (is_exact and kind != leaf.dtype):
                raise CheckpointError(f"{path} is stored as {stored[path]}, not {leaf.dtype.name}.")
            read = partial(_read, folder, path, leaf.shape, kind)
            values[path] = Stored(leaf.shape, kind, read, exact=is_exact)
    return Opened(fill(model, values), partial(read_tokenizer, folder))


def open_native_config(folder: Path) -> ModelConfig:
    """The config of a folder."""
    with about(folder):
        return _settings(folder)[0]


def _settings(folder: Path) -> tuple[ModelConfig, dict[str, str]]:
    settings = read_json(folder / SETTINGS)
    config, held = settings.get("config"), settings.get("parts")
    if settings.get("version") != _VERSION:
        raise CheckpointError(
            f"its version is {settings.get('version')!r}, this release reads {_VERSION}; "
            "pip install --upgrade equigemma may help."
        )
    if not isinstance(config, dict) or not isinstance(held, dict):
        raise CheckpointError(f"its {SETTINGS} has no config, or no parts.")
    if not all(isinstance(kind, str) for kind in held.values()):
        raise CheckpointError(f"its {SETTINGS} is damaged: parts must be strings.")
    return config_from_json(config), held


def _skeleton(config: ModelConfig, held: dict[str, str]) -> Transformer:
    def build(plain: Transformer) -> Transformer:
        return quantize_like(prepare(plain), held)

    return eqx.filter_eval_shape(build, skeleton(config))


def _read(folder: Path, key: str, shape: tuple[int, ...], kind: Any, dtype: Any) -> np.ndarray:
    with about(folder), opened(folder / WEIGHTS) as file:
        array = file.get_tensor(key)
    if array.shape != shape or array.dtype != kind or math.prod(shape) != array.size:
        raise CheckpointError(f"{folder / WEIGHTS} changed while it was read.")
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype, copy=False)
