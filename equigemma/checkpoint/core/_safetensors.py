"""The tensors of a Hugging Face folder: located and checked, read one at a time.

The library `safetensors` checks the headers.

**Source:** `docs` of safetensors for the index of a model in several files.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from equigemma.checkpoint.core._errors import CheckpointError, about
from equigemma.checkpoint.core._json import read_json


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_SHARD = re.compile(r"[^/\\:\0]+\.safetensors")
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype("bfloat16"),
    "F64": np.dtype(np.float64),
}
# Numbers compared at a time.
_PIECE = 1 << 18


class Tensor(NamedTuple):
    """Where a tensor is, and what its file's header says about it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    parts: tuple["Tensor", ...] = ()
    """Of which it is made, one after the other; none: it is in the file under its name."""


def read_headers(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor by its name, and those that the index lists with the file that it names."""
    tensors: dict[str, Tensor] = {}
    files, listed = _files(folder)
    for name in files:
        with opened(folder / name) as file:
            for key in file.keys():
                if key in tensors:
                    raise CheckpointError(f"the tensor {key} is in two of its files.")
                part = file.get_slice(key)
                tensors[key] = Tensor(folder / name, key, tuple(part.get_shape()), part.get_dtype())
    return tensors, listed


def _files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the files with weights, and in which of them the index says that each tensor is."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], {}
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"there is neither {WEIGHTS} nor {INDEX} in it. Weights in other files (.bin, .pt) are "
            "not read: they are pickled, and can run any code."
        )
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"its {INDEX} has no weight_map.")
    for name in listed.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"its {INDEX} names a file that is no .safetensors beside it: {name!r:.99}."
            )
    return list(dict.fromkeys(listed.values())), listed


def dtype_of(tensor: Tensor) -> np.dtype:
    """The dtype that its numbers are read in: the stored one, or float32 for wider floats."""
    dtype = _stored_dtype(tensor)
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def _stored_dtype(tensor: Tensor) -> np.dtype:
    try:
        return _DTYPES[tensor.kind]
    except KeyError:
        raise CheckpointError(
            f"the tensor {tensor.name} is stored as {tensor.kind}; weights are read from "
            f"{', '.join(_DTYPES)}."
        ) from None


def read(tensor: Tensor) -> np.ndarray:
    """All numbers of a tensor, in their stored dtype."""
    if tensor.parts:
        return np.concatenate([read(part) for part in tensor.parts]).reshape(tensor.shape)
    with about(tensor.file.parent), opened(tensor.file) as file:
        array = file.get_tensor(tensor.name)
        if array.shape != tensor.shape or array.dtype != _stored_dtype(tensor):
            raise CheckpointError(f"{tensor.file.name} changed while it was read.")
        return array


def equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers. Both are in memory for as long as it takes."""
    if first.shape != second.shape:
        return False
    # The library would read a whole tensor for each of its slices.
    ours, theirs = (read(tensor).reshape(-1) for tensor in (first, second))
    for start in range(0, ours.size, _PIECE):
        piece = slice(start, start + _PIECE)
        if not np.array_equal(ours[piece].astype(np.float64), theirs[piece].astype(np.float64)):
            return False
    return True


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
