"""Files of safetensors, written one tensor at a time.

The library's own writer wants every tensor of a file in memory at once. The format is a header in
JSON with the place of each tensor, and the tensors.

**Source:** `docs` of safetensors for the format.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equigemma.checkpoint.core._keymap import Assignment, Rule
from equigemma.checkpoint.core._stored import FLOATS, float_dtype


_KINDS_OF_INTEGERS = {np.dtype(np.int8): "I8"}
# Where tensors start in a file, so that they can be mapped into memory.
_ALIGNMENT = 8


class Part(NamedTuple):
    """One tensor to be written: part of which leaf, under which name, in which dtype."""

    entry: Assignment
    place: int
    key: str
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.entry.key_shape) * self.dtype.itemsize


def header(shard: list[Part]) -> bytes:
    """What a file with these tensors begins with; they follow in the order of their item sizes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for part in by_item_size(shard):
        header[part.key] = {
            "dtype": (FLOATS | _KINDS_OF_INTEGERS)[part.dtype],
            "shape": list(part.entry.key_shape),
            "data_offsets": [at, at + part.nbytes],
        }
        at += part.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def by_item_size(shard: list[Part]) -> list[Part]:
    """Widest dtype first, so that every tensor starts at a multiple of its item size."""
    return sorted(shard, key=lambda part: -part.dtype.itemsize)


def write_tensor(path: Path, name: str, array: np.ndarray) -> None:
    """Writes a file with one tensor."""
    entry = Assignment(name, (name,), Rule(name, name), array.shape)
    part = Part(entry, 0, name, float_dtype(name, array.dtype))
    with open(path, "wb") as file:
        file.write(header([part]))
        np.ascontiguousarray(array).view(np.uint8).tofile(file)
