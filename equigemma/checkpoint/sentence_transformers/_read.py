"""Checkpoints of text-embedding models: a model, and beside it what `modules.json` lists.

The layout of a folder is that of the library `sentence-transformers`: a transformer, the mean of
its hidden states, linear maps in folders of their own, and vectors of length 1. A GGUF file of
llama.cpp has the linear maps among its tensors.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equigemma.checkpoint import _hub
from equigemma.checkpoint.core._errors import CheckpointError, about
from equigemma.checkpoint.core._fields import Fields, short
from equigemma.checkpoint.core._json import read_json
from equigemma.checkpoint.core._safetensors import WEIGHTS, read_tensors
from equigemma.checkpoint.core._stored import Progress, put_on_device
from equigemma.checkpoint.gguf._config import DENSE, EMBEDDING
from equigemma.checkpoint.gguf._read import open_gguf
from equigemma.checkpoint.gguf._split import open_file
from equigemma.checkpoint.hf._read import open_folder
from equigemma.checkpoint.sentence_transformers._settings import SETTINGS, TEXTS, read_settings
from equigemma.embedding import Embedder, EmbedderSettings
from equigemma.nn import Einsum
from equigemma.tokenizers import SpecialTokens, Tokenizer


MODULES = "modules.json"
_ALSO = (MODULES, SETTINGS, TEXTS, "*_Pooling/*", "*_Dense/*")
IDENTITY = "torch.nn.modules.linear.Identity"
_FOLDER = re.compile(r"[A-Za-z0-9_-]*")


def load_embedder(
    source: str | os.PathLike[str],
    dtype: np.dtype,
    revision: str | None,
    progress: Progress | None,
) -> tuple[Embedder, Tokenizer]:
    """See `checkpoint.load_embedder`."""
    path = Path(source).expanduser()
    if not path.exists():
        name = os.fspath(source)
        if not _hub.is_name(name):
            raise CheckpointError(
                f"{name} is neither a folder, a .gguf file nor a name on the hub."
            )
        path = _hub.download(name, revision, also=_ALSO)
    with about(path):
        dense = _of_gguf(path) if path.is_file() else _dense(path)
    opened = open_gguf(path) if path.is_file() else open_folder(path)
    tokenizer = opened.tokenizer()
    if tokenizer is None:
        raise CheckpointError(f"{path} has no tokenizer.json or tokenizer.model.")
    with about(path):
        if any(
            layer.attention.mask_kind != "bidirectional" for layer in opened.model.config.layers
        ):
            raise CheckpointError(
                "its model writes texts, it is not made to be averaged: "
                + (
                    f"its architecture is not {EMBEDDING}."
                    if path.is_file()
                    else "its config.json does not say use_bidirectional_attention."
                )
            )
        maps, width = [], opened.model.config.width
        for name, weight in dense:
            if weight.shape[1] != width:
                raise CheckpointError(
                    f"its {name} takes {weight.shape[1]} numbers, and there are {width}."
                )
            width = weight.shape[0]
            maps.append(_einsum(weight, dtype))
        read = _read_gguf if path.is_file() else read_settings
        settings = read(path, tokenizer.special)
    embedder = object.__new__(Embedder)
    fields = {
        "model": put_on_device(opened.model, dtype, None, progress),
        "dense": tuple(maps),
        "settings": settings,
    }
    for name, value in fields.items():
        object.__setattr__(embedder, name, value)
    return embedder, tokenizer


def _einsum(weight: np.ndarray, dtype: np.dtype) -> Einsum:
    shape = weight.shape[::-1]
    einsum = jax.eval_shape(
        lambda: Einsum("...D,DO->...O", shape, key=jax.random.key(0), dtype=jnp.dtype(dtype))
    )
    return jax.tree.map(lambda _: jnp.asarray(weight.T, dtype), einsum)


def _read_gguf(path: Path, special: SpecialTokens) -> EmbedderSettings:
    """What llama.cpp puts around texts; it refuses those that are too long."""
    metadata = open_file(path).metadata
    begins = metadata.get("tokenizer.ggml.add_bos_token") is not False
    ends = metadata.get("tokenizer.ggml.add_eos_token") is True
    return EmbedderSettings(
        prefix=(special.bos,) if begins else (),
        suffix=(special.eos,) if ends else (),
        max_length=None,
    )


def _of_gguf(path: Path) -> list[tuple[str, np.ndarray]]:
    """The linear maps of a GGUF file."""
    file = open_file(path)
    found = [name for name in DENSE if f"{name}.weight" in file.tensors]
    if file.metadata.get("general.architecture") == EMBEDDING and not found:
        raise CheckpointError(
            f"it has the model without the linear maps after it, {' and '.join(DENSE)}; "
            "convert_hf_to_gguf.py of llama.cpp takes them along with "
            "--sentence-transformers-dense-modules."
        )
    weights = []
    with ThreadPoolExecutor(1) as pool:
        for name in found:
            weight = file.read(file.tensors[f"{name}.weight"], np.dtype(np.float32), pool)
            if weight.ndim != 2:
                raise CheckpointError(f"its {name}.weight has {weight.ndim} axes, not 2.")
            weights.append((name, weight))
    return weights


def _dense(folder: Path) -> list[tuple[str, np.ndarray]]:
    """Name and weight `[outputs, inputs]` of each linear map, in their order."""
    kinds, found = [], []
    for module in _modules(folder / MODULES):
        name, kind = module.get("path"), module.get("type")
        if not isinstance(name, str) or not isinstance(kind, str) or not _FOLDER.fullmatch(name):
            raise CheckpointError(f"its {MODULES} has an entry without path and type.")
        kinds.append(kind.rpartition(".")[2])
        if kinds[-1] == "Dense":
            found.append((name, _read_dense(folder / name)))
        elif kinds[-1] == "Pooling":
            _check_pooling(folder / name / "config.json", name)
    count = len(found)
    if kinds != ["Transformer", "Pooling", *["Dense"] * count, "Normalize"]:
        raise CheckpointError(
            f"its {MODULES} lists {', '.join(kinds)}; only Transformer, Pooling, Dense and "
            "Normalize, in this order, are supported."
        )
    return found


def _modules(path: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"it has no {MODULES}, so it is no model that makes vectors."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {MODULES} is damaged: it is not valid JSON.") from error
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise CheckpointError(f"its {MODULES} is damaged: it is no list of objects.")
    return value


def _read_dense(folder: Path) -> np.ndarray:
    data = read_json(folder / "config.json")
    for name in ("bias", "activation_function"):
        # The library would take a bias and tanh.
        if name not in data:
            raise CheckpointError(f"its {folder.name}/config.json does not say {name}.")
    read = Fields(data, name=f"{folder.name}/config.json: ")
    shape = (read.size("out_features"), read.size("in_features"))
    read.expect("bias", False)
    read.expect("activation_function", IDENTITY)
    read.expect("use_residual", False)
    for name in ("module_input_name", "module_output_name"):
        read.expect(name, "sentence_embedding")
    tensors = read_tensors(folder / WEIGHTS)
    weight = tensors.pop("linear.weight", None)
    if weight is None or tensors or weight.shape != shape:
        raise CheckpointError(
            f"its {folder.name}/{WEIGHTS} must hold linear.weight {list(shape)} and nothing else."
        )
    return weight


def _check_pooling(path: Path, name: str) -> None:
    data = read_json(path)
    modes = {key for key, value in data.items() if key.startswith("pooling_mode") and value is True}
    mode = data.get("pooling_mode")
    if modes - {"pooling_mode_mean_tokens"} or not (modes or mode == "mean"):
        raise CheckpointError(
            f"its {name} pools by {short(mode) if mode else ', '.join(sorted(modes)) or 'nothing'};"
            " only the mean is supported."
        )
    if data.get("include_prompt") is False:
        raise CheckpointError(f"its {name} leaves out prompts, which is not supported.")
