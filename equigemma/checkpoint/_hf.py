"""Folders in the layout of Hugging Face: which model they hold, and how it is read."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from equigemma.checkpoint._errors import CheckpointError, about
from equigemma.checkpoint._hf_config import read_config
from equigemma.checkpoint._hf_rules import TOWER, ignored, rules
from equigemma.checkpoint._hf_tensors import Tensor, dtype_of, read, read_headers
from equigemma.checkpoint._hf_tokenizer import read_tokenizer
from equigemma.checkpoint._json import read_json
from equigemma.checkpoint._keymap import fill, leaf_shapes, plan
from equigemma.checkpoint._linen import skeleton
from equigemma.checkpoint._stored import Opened, stored
from equigemma.config import Dense, DensePlusMoE, ModelConfig


CONFIG = "config.json"

# In front of the names of the text model: alone, with a head, with a tower for images before
# transformers 4.52 and after it, and that without a head.
_PREFIXES = ("", "model.", "language_model.model.", "model.language_model.", "language_model.")


def open_folder(folder: Path) -> Opened:
    """Model and tokenizer of a folder, of which only config and headers are read.

    **Raises:** `CheckpointError` if something is missing, damaged, or not supported.
    """
    with about(folder):
        config = read_config(read_json(folder / CONFIG))
        tensors = read_headers(folder)
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
                [dtype_of(tensors[key]) for key in entry.keys],
                lambda key, dtype: read(tensors[key]),
            )
            for entry in assignments
        }
    return Opened(fill(model, weights), partial(read_tokenizer, folder))


def open_folder_config(folder: Path) -> ModelConfig:
    """The config of a folder, from its `config.json` alone."""
    with about(folder):
        return read_config(read_json(folder / CONFIG))


def _check_sizes(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
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


def _prefix(tensors: Mapping[str, Tensor]) -> str:
    """What stands in front of the names of the text model; decided by where its embedding is."""
    for prefix in _PREFIXES:
        if f"{prefix}embed_tokens.weight" in tensors:
            return prefix
    return "model."


def _tower(tensors: Mapping[str, Tensor]) -> str:
    """What stands in front of the names of a vision tower; some releases leave out a part."""
    for prefix in ("", "model."):
        for part in (TOWER, "vision_tower."):
            if f"{prefix}{part}embeddings.patch_embedding.weight" in tensors:
                return prefix + part
    return TOWER
