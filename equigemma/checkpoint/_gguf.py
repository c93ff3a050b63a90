"""GGUF files, the format of llama.cpp: how a model is read.

What tensors are called is in `_gguf_rules.py`, what metadata say in `_gguf_config.py`.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from equigemma.checkpoint._errors import about
from equigemma.checkpoint._gguf_config import read_config
from equigemma.checkpoint._gguf_file import GGUFFile
from equigemma.checkpoint._gguf_leaves import file_shapes, from_file
from equigemma.checkpoint._gguf_rules import FACTORS, ignored, rules
from equigemma.checkpoint._gguf_vocab import read_tokenizer
from equigemma.checkpoint._keymap import fill, plan
from equigemma.checkpoint._linen import skeleton
from equigemma.checkpoint._stored import Opened, stored
from equigemma.config import ModelConfig
from equigemma.tokenizer import Tokenizer


def open_gguf(path: Path) -> Opened:
    """Model and tokenizer of a GGUF file, of which only the header is read.

    **Raises:** `CheckpointError` if something is missing, damaged, or not supported.
    """
    file = GGUFFile.open(path)
    with about(path):
        config = read_config(file, _read_factors(file))
        model = skeleton(config)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        assignments = plan(file_shapes(model), rules(config), shapes, ignored(config))

    def read_key(key: str, dtype: np.dtype) -> np.ndarray:
        with about(path), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return file.read(file.tensors[key], dtype, pool)

    def tokenizer() -> Tokenizer:
        with about(path):
            return read_tokenizer(file.metadata, origin=path)

    weights = {
        entry.path: stored(entry, (file.tensors[key].dtype for key in entry.keys), read_key)
        for entry in assignments
    }
    return Opened(fill(model, from_file(weights, config)), tokenizer)


def open_gguf_config(path: Path) -> ModelConfig:
    """The config of a GGUF file, from its header alone."""
    file = GGUFFile.open(path)
    with about(path):
        return read_config(file, _read_factors(file))


def _read_factors(file: GGUFFile) -> np.ndarray | None:
    """What angles are divided by, if the file says so."""
    tensor = file.tensors.get(FACTORS)
    if tensor is None:
        return None
    with ThreadPoolExecutor(1) as pool:
        return file.read(tensor, np.dtype(np.float32), pool)
