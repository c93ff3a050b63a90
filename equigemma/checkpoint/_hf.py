"""Folders in the layout of Hugging Face: what their tensors are called, and how they are read.

The library `safetensors` checks the headers and reads one tensor at a time.

**Source:** transformers `models/gemma*/modeling_gemma*.py` for the names; `docs` of safetensors for
the index of a model in several files.
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
from equigemma.checkpoint._hf_tokenizer import read_tokenizer
from equigemma.checkpoint._json import read_json
from equigemma.checkpoint._keymap import Ignore, Rule, fill, leaf_shapes, plan
from equigemma.checkpoint._layout import gate_axes, uniform
from equigemma.checkpoint._linen import skeleton
from equigemma.checkpoint._stored import Opened, stored
from equigemma.config import ModelConfig


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_SHARD = re.compile(r"[^/\\:\0]+\.safetensors")
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": jnp.dtype("bfloat16")}
# In front of the names of the text model: alone, with a head, with a tower for images before
# transformers 4.52 and after it, and that without a head.
_PREFIXES = ("", "model.", "language_model.model.", "model.language_model.", "language_model.")
_IGNORE = (
    Ignore("lm_head.weight", "it is the embedding once more"),
    Ignore("language_model.lm_head.weight", "it is the embedding once more"),
    *(
        Ignore(f"{prefix}{part}.*", "only the text part of the model is read")
        for prefix in ("", "model.")
        for part in ("vision_tower", "multi_modal_projector")
    ),
    Ignore("*.rotary_emb.inv_freq", "it follows from the config"),
)


def rules(config: ModelConfig, prefix: str = "model.") -> tuple[Rule, ...]:
    """Names under `prefix` for the leaves of a model with this config."""
    layer = f"{prefix}layers.{{i}}."
    # With a norm after each sub-layer, the one before the feed-forward has another name.
    has_post = config.layers[0].post_norm is not None
    pre_ffw = "pre_feedforward_layernorm" if has_post else "post_attention_layernorm"
    norms = {
        "pre_attention_norm": "input_layernorm",
        "pre_ffw_norm": pre_ffw,
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
    }
    if has_post:
        norms["post_attention_norm"] = "post_attention_layernorm"
        norms["post_ffw_norm"] = "post_feedforward_layernorm"
    q, k, v = (f"{layer}self_attn.{name}_proj.weight" for name in "qkv")
    projection = "layers.{i}.attention.projection."
    gates = [
        Rule(
            f"layers.{i}.ffw.gate.weight",
            tuple(f"{prefix}layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up")),
            axes=f"F D -> {gate_axes(config, i)}",
        )
        for i in range(len(config.layers))
    ]
    return (
        Rule("embedding.weight", f"{prefix}embed_tokens.weight"),
        Rule("final_norm.scale", f"{prefix}norm.weight"),
        *(
            Rule(f"layers.{{i}}.{ours}.scale", f"{layer}{theirs}.weight")
            for ours, theirs in norms.items()
        ),
        Rule(f"{projection}q.weight", q, axes="(N H) D -> N D H"),
        Rule(f"{projection}kv.weight", (k, v), axes="(K H) D -> K D H"),
        Rule(f"{projection}qkv.weight", (q, k, v), axes="(N H) D -> N D H"),
        Rule(
            "layers.{i}.attention.output.weight",
            f"{layer}self_attn.o_proj.weight",
            axes="D (N H) -> N H D",
        ),
        *gates,
        Rule("layers.{i}.ffw.down.weight", f"{layer}mlp.down_proj.weight", axes="D F -> F D"),
    )


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
        assignments = plan(leaf_shapes(model), rules(config, _prefix(tensors)), shapes, _IGNORE)
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
        with _opened(folder / name) as file:
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
    if len(config.layers) > len(tensors):
        raise CheckpointError(
            f"its {CONFIG} claims {len(config.layers)} layers, and there are {len(tensors)} "
            "tensors."
        )
    parts = uniform(config)
    longest = max(config.vocab, parts.hidden, parts.attention.heads * parts.attention.head_dim)
    largest = max(math.prod(tensor.shape) for tensor in tensors.values())
    if longest * config.width > largest:
        raise CheckpointError(
            f"its {CONFIG} describes a weight of {longest * config.width} numbers, and the largest "
            f"tensor has {largest}."
        )


def _prefix(tensors: Mapping[str, _Tensor]) -> str:
    """What stands in front of the names of the text model; decided by where its embedding is."""
    for prefix in _PREFIXES:
        if f"{prefix}embed_tokens.weight" in tensors:
            return prefix
    return "model."


def _dtype(tensor: _Tensor) -> np.dtype:
    try:
        return _DTYPES[tensor.kind]
    except KeyError:
        raise CheckpointError(
            f"the tensor {tensor.name} is stored as {tensor.kind}; weights are read from "
            f"{', '.join(_DTYPES)}."
        ) from None


def _read(tensor: _Tensor) -> np.ndarray:
    with about(tensor.file.parent), _opened(tensor.file) as file:
        array = file.get_tensor(tensor.name)
        if array.shape != tensor.shape or array.dtype != _dtype(tensor):
            raise CheckpointError(f"{tensor.file.name} changed while it was read.")
        return array


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
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
