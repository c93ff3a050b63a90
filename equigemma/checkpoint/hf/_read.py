"""Folders in the layout of Hugging Face: which model they hold, and how it is read."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from equigemma.checkpoint.core._errors import CheckpointError, about
from equigemma.checkpoint.core._json import read_json
from equigemma.checkpoint.core._keymap import fill, leaf_shapes, plan
from equigemma.checkpoint.core._safetensors import (
    INDEX,
    WEIGHTS,
    Tensor,
    dtype_of,
    equal,
    read,
    read_headers,
)
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.checkpoint.core._stored import Opened, stored
from equigemma.checkpoint.core._tokenizer_files import read_tokenizer
from equigemma.checkpoint.hf._config import read_config
from equigemma.checkpoint.hf._experts import join_experts
from equigemma.checkpoint.hf._rules import HEADS, TOWER, Names, ignored, names_of, rules
from equigemma.config import DensePlusMoEConfig, FeedForwardConfig, ModelConfig


CONFIG = "config.json"

# In front of the names of the text model: alone, with a head, with a tower for images before
# transformers 4.52 and after it, and that without a head.
_PREFIXES = ("", "model.", "language_model.model.", "model.language_model.", "language_model.")


def open_folder(folder: Path, *, text_only: bool = False) -> Opened:
    """Model and tokenizer of a folder, of which only config and headers are read.

    **Arguments:** `text_only`: without a vision tower, of which nothing is read then.

    **Raises:** `CheckpointError` if something is missing, damaged, or not supported.
    """
    with about(folder):
        config, names, tensors = _read_headers(folder, text_only)
        model = skeleton(config)
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        assignments = plan(leaf_shapes(model), rules(config, names), shapes, ignored(config, names))
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
    """The config of a folder: of its `config.json`, and of its weights where it has any here."""
    with about(folder):
        if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
            return _read_headers(folder, False)[0]
        return read_config(read_json(folder / CONFIG))


def _read_headers(folder: Path, text_only: bool) -> tuple[ModelConfig, Names, Mapping[str, Tensor]]:
    """The model that config and weights together are, and what it is called in its tensors."""
    data = read_json(folder / CONFIG)
    stored_tensors, listed = read_headers(folder)
    tensors = join_experts(stored_tensors)
    # Weights of the text model alone go on saying what their tower was.
    config = read_config(data, text_only=text_only or not any(map(_of_tower, tensors)))
    names = _names(tensors, is_tied=config.lm_head == "tied")
    _check_sizes(config, tensors)
    config = _with_head(config, names, tensors)
    if listed:
        _check_index(config, names, tensors, listed)
    return config, names, tensors


def _check_index(
    config: ModelConfig,
    names: Names,
    tensors: Mapping[str, Tensor],
    listed: Mapping[str, str],
) -> None:
    """Refuses an index that names another file than the one that has a weight.

    A tied head it may list all the same: transformers writes some that no file has.
    """
    for entry in plan(leaf_shapes(skeleton(config)), rules(config, names)):
        for key in entry.keys:
            found = tensors[key].file.name if key in tensors else None
            if key in listed and found != listed[key]:
                raise CheckpointError(
                    f"its {INDEX} says that {listed[key]} has {key}, which it has not."
                )


def _with_head(config: ModelConfig, names: Names, tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The config, untied where there is a head and it is not the embedding once more.

    **Source:** transformers 5.24 `modeling_utils.py::tie_weights`, which compares them too.
    """
    head, embedding = tensors.get(names.head), tensors.get(f"{names.prefix}embed_tokens.weight")
    if config.layers[0].attention.mask_kind == "bidirectional":
        return config
    if config.lm_head == "untied" and head is None:
        raise CheckpointError(
            f"its {CONFIG} says tie_word_embeddings: false, and there is no {HEADS[0]}; "
            "transformers would draw one at random. Set it to true if the embedding is the head."
        )
    if head is None or embedding is None or equal(head, embedding):
        return config
    return replace(config, lm_head="untied")


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
            case FeedForwardConfig(hidden_dim=hidden):
                yield hidden * config.width
            case DensePlusMoEConfig(dense=dense, moe=moe):
                yield max(dense.hidden_dim, 2 * moe.num_experts * moe.hidden_dim) * config.width


def _names(tensors: Mapping[str, Tensor], *, is_tied: bool) -> Names:
    """What the tensors of a model are called; decided by where its embedding is, or its norm."""
    parts = ("embed_tokens.weight", "norm.weight")
    found = (prefix for part in parts for prefix in _PREFIXES if f"{prefix}{part}" in tensors)
    names = replace(names_of(next(found, "model.")), tower=_tower(tensors))
    head = next((head for head in HEADS if head in tensors), names.head)
    embedding = f"{names.prefix}embed_tokens.weight"
    # Of two that are tied one may be stored, whichever it is.
    stands_in = is_tied and embedding not in tensors and head in tensors
    return replace(names, head=head, embedding=head if stands_in else embedding)


def _of_tower(name: str) -> bool:
    """Whether a tensor is of a vision tower, or of what leads from it to the text model."""
    return name.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector."))


def _tower(tensors: Mapping[str, Tensor]) -> str:
    """What stands in front of the names of a vision tower; some releases leave out a part."""
    for prefix in ("", "model."):
        for part in (TOWER, "vision_tower."):
            if f"{prefix}{part}embeddings.patch_embedding.weight" in tensors:
                return prefix + part
    return TOWER
