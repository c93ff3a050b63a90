"""GGUF files, the format of llama.cpp: how a model is read.

What tensors are called is in `_rules.py`, what metadata say in `_config.py`; of vision
towers, which are files of their own, both are in `_vision.py`.
"""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from equigemma.checkpoint.core._errors import CheckpointError, about
from equigemma.checkpoint.core._keymap import Ignore, Rule, fill, leaf_shapes, plan
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.checkpoint.core._stored import Opened, Stored, stored
from equigemma.checkpoint.gguf._config import read_config
from equigemma.checkpoint.gguf._container import GGUFFile
from equigemma.checkpoint.gguf._leaves import file_shapes, from_file
from equigemma.checkpoint.gguf._rules import FACTORS, ignored, rules
from equigemma.checkpoint.gguf._split import open_file
from equigemma.checkpoint.gguf._vision import CLIP, TEXT, read_vision, tower_beside, vision_rules
from equigemma.checkpoint.gguf._vocab import read_tokenizer
from equigemma.config import ModelConfig
from equigemma.tokenizers import Tokenizer


def open_gguf(path: Path, vision: Path | None = None, *, pair: bool = False) -> Opened:
    """Model and tokenizer of a GGUF file, of which only the header is read.

    **Arguments:** `vision`: the file of its vision tower; without one it is a model of text.
    `pair`: take a vision tower that lies beside, if any does.

    **Raises:** `CheckpointError` if something is missing, damaged, or not supported.
    """
    file, tower = _files(path, vision, pair)
    with about(path):
        config = read_config(file, _read_factors(file))
        shapes = file_shapes(skeleton(config))
        weights = from_file(_weights(file, shapes, rules(config), ignored(config)), config)
    if tower is not None:
        with about(tower.path):
            config = _with_tower(file, tower, config)
            assert config.vision is not None  # it was just read
            ours = leaf_shapes(skeleton(config))
            shapes = {path: shape for path, shape in ours.items() if path.startswith("vision.")}
            names = vision_rules(config.vision, tower.tensors.values())
            weights |= _weights(tower, shapes, names, ())

    def tokenizer() -> Tokenizer:
        with about(path):
            return read_tokenizer(file.metadata, origin=path)

    return Opened(fill(skeleton(config), weights), tokenizer)


def open_gguf_config(path: Path, vision: Path | None = None, *, pair: bool = False) -> ModelConfig:
    """The config of a GGUF file, from its header alone; the arguments are those of `open_gguf`."""
    file, tower = _files(path, vision, pair)
    with about(path):
        config = read_config(file, _read_factors(file))
    if tower is None:
        return config
    with about(tower.path):
        return _with_tower(file, tower, config)


def _files(path: Path, vision: Path | None, pair: bool) -> tuple[GGUFFile, GGUFFile | None]:
    """The file of the text model, and that of its vision tower."""
    file = open_file(path)
    kind = file.metadata.get("general.architecture")
    with about(path):
        if kind == CLIP:
            raise CheckpointError(
                "it is the vision tower of a model; load the file of its text model, and give this "
                "one as vision= if it does not lie beside it."
            )
        if vision is not None and kind != TEXT:
            raise CheckpointError(
                f"its architecture is {kind!r}, and only {TEXT!r} is read with a vision tower."
            )
        if vision is None and pair and kind == TEXT:
            vision = tower_beside(path)
    return file, None if vision is None else open_file(vision)


def _with_tower(file: GGUFFile, tower: GGUFFile, config: ModelConfig) -> ModelConfig:
    tokens = file.metadata["tokenizer.ggml.tokens"]
    return read_vision(tower.metadata, tower.tensors, config, tokens)


def _weights(
    file: GGUFFile,
    ours: Mapping[str, tuple[int, ...]],
    rules: Iterable[Rule],
    ignored: Iterable[Ignore],
) -> dict[str, Stored]:
    """Our leaves of these shapes, in the file still."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}

    def read_key(key: str, dtype: np.dtype) -> np.ndarray:
        with about(file.path), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return file.read(file.tensors[key], dtype, pool)

    def read_blocks(keys: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        with about(file.path):
            found = [file.read_blocks(file.tensors[key]) for key in keys]
        integers, scales = (
            np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays])
            for arrays in zip(*found, strict=True)
        )
        return integers, scales

    weights = {}
    for entry in plan(ours, rules, shapes, ignored):
        tensors = [file.tensors[key] for key in entry.keys]
        leaf = stored(entry, (tensor.dtype for tensor in tensors), read_key)
        if all(tensor.in_bytes for tensor in tensors):
            leaf = replace(leaf, blocks=partial(read_blocks, entry.keys))
        weights[entry.path] = leaf
    return weights


def _read_factors(file: GGUFFile) -> np.ndarray | None:
    """What angles are divided by, if the file says so."""
    tensor = file.tensors.get(FACTORS)
    if tensor is None:
        return None
    with ThreadPoolExecutor(1) as pool:
        return file.read(tensor, np.dtype(np.float32), pool)
