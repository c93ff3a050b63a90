"""Folders in the layout of Hugging Face, read.

The library `safetensors` checks the headers and reads one tensor at a time.

**Source:** `docs` of safetensors for the index of a model in several files.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from equigemma.checkpoint._errors import CheckpointError, about
from equigemma.checkpoint._hf_config import read_config
from equigemma.checkpoint._hf_rules import TOWER, ignored, rules
from equigemma.checkpoint._hf_tokenizer import read_tokenizer
from equigemma.checkpoint._json import read_json
from equigemma.checkpoint._keymap import fill, leaf_shapes, plan
from equigemma.checkpoint._linen import skeleton
from equigemma.checkpoint._stored import Opened, stored
from equigemma.config import Dense, DensePlusMoE, ModelConfig


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_SHARD = re.compile(r"[^/\\:\0]+\.safetensors")
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": jnp.dtype("bfloat16")}
# In front of the names of the text model: alone, with a head, with a tower for images before
# transformers 4.52 and after it, and that without a head.
_PREFIXES = ("", "model.", "language_model.model.", "model.language_model.", "language_model.")


def open_folder(folder: Path) -> Opened:
    """Model and tokenizer of a folder, of which only config and headers are read.

    **Raises:** `CheckpointError` if something is missing, damaged, or not supported.
    """
    with about(folder):
        config = read_config(read_json(folder / CONFIG))
        tensors = _headers(folder)
        _check_sizes(config, tensors)
        model = skeleton(config)
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        names = _prefix(tensors), _tower(tensors)
        assignments = plan(
            leaf_shapes(model), rules(config, *names), shapes, ignored(config, *names)
        )
        weights = {
            entry.path: stored(
                entry,
                [_dtype(tensors[key]) for key in entry.keys],
                lambda key, dtype: _read(tensors[key]),
            )
            for entry in assignments
        }
    return Opened(fill(model, weights), partial(read_tokenizer, folder))


def open_folder_config(folder: Path) -> ModelConfig:
    """The config of a folder, from its `config.json` alone."""
    with about(folder):
        return read_config(read_json(folder / CONFIG))


class _Tensor(NamedTuple):
    """Where a tensor is, and what its file's header says about it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str


def _headers(folder: Path) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    for name, listed in _files(folder).items():
        with opened(folder / name) as file:
            held = set(file.keys())
            if missing := sorted(listed - held):
                raise CheckpointError(
                    f"its {INDEX} says that {name} has {', '.join(missing[:5])}, which it has not."
                )
            for key in held:
                if key in tensors:
                    raise CheckpointError(f"the tensor {key} is in two of its files.")
                part = file.get_slice(key)
                tensors[key] = _Tensor(
                    folder / name, key, tuple(part.get_shape()), part.get_dtype()
                )
    return tensors


def _files(folder: Path) -> dict[str, set[str]]:
    """Names of the files with weights, and what the index says is in each."""
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: set()}
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"there is neither {WEIGHTS} nor {INDEX} in it. Weights in other files (.bin, .pt) are "
            "not read: they are pickled, and can run any code."
        )
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"its {INDEX} has no weight_map.")
    files: dict[str, set[str]] = {}
    for tensor, name in listed.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"its {INDEX} names a file that is no .safetensors beside it: {name!r:.99}."
            )
        files.setdefault(name, set()).add(tensor)
    return files


def _check_sizes(config: ModelConfig, tensors: Mapping[str, _Tensor]) -> None:
    """Refuses a made-up size before anything is built from it."""
    count = len(config.layers) + (0 if config.vision is None else config.vision.layers)
    if count > len(tensors):
        raise CheckpointError(
            f"its {CONFIG} claims {count} layers, and there are {len(tensors)} tensors."
        )
    claimed = max(_claimed(config))
    largest = max(math.prod(tensor.shape) for tensor in tensors.values())
    if claimed > largest:
        raise CheckpointError(
            f"its {CONFIG} describes a weight of {claimed} numbers, and the largest tensor has "
            f"{largest}."
        )


def _claimed(config: ModelConfig) -> Iterator[int]:
    """Sizes of tensors that there must be."""
    yield config.vocab * config.width
    if config.vision is not None:
        yield config.vision.width * max(config.vision.hidden, config.vision.side**2)
    if config.per_layer is not None:
        yield config.per_layer.vocab * config.per_layer.dim * len(config.layers)
    for layer in config.layers:
        yield layer.attention.heads * layer.attention.head_dim * config.width
        match layer.ffw:
            case Dense(hidden=hidden):
                yield hidden * config.width
            case DensePlusMoE(dense=dense, moe=moe):
                yield max(dense.hidden, 2 * moe.experts * moe.hidden) * config.width


def _prefix(tensors: Mapping[str, _Tensor]) -> str:
    """What stands in front of the names of the text model; decided by where its embedding is."""
    for prefix in _PREFIXES:
        if f"{prefix}embed_tokens.weight" in tensors:
            return prefix
    return "model."


def _tower(tensors: Mapping[str, _Tensor]) -> str:
    """What stands in front of the names of a vision tower; some releases leave out a part."""
    for prefix in ("", "model."):
        for part in (TOWER, "vision_tower."):
            if f"{prefix}{part}embeddings.patch_embedding.weight" in tensors:
                return prefix + part
    return TOWER


def _dtype(tensor: _Tensor) -> np.dtype:
    try:
        return _DTYPES[tensor.kind]
    except KeyError:
        raise CheckpointError(
            f"the tensor {tensor.name} is stored as {tensor.kind}; weights are read from "
            f"{', '.join(_DTYPES)}."
        ) from None


def _read(tensor: _Tensor) -> np.ndarray:
    with about(tensor.file.parent), opened(tensor.file) as file:
        array = file.get_tensor(tensor.name)
        if array.shape != tensor.shape or array.dtype != _dtype(tensor):
            raise CheckpointError(f"{tensor.file.name} changed while it was read.")
        return array


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of one file, by name.

    **Raises:** `CheckpointError` if it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    with opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file as `safetensors` sees it.

    It reads by offset, not through a memory map: mapped pages count as memory of this process.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "Reading .safetensors files needs the package safetensors, which is not installed: "
            'pip install "equigemma[hf]".'
        ) from error
    try:
        with safe_open(path, "numpy", backend="pread") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} is cut off or damaged: {error}.") from error
