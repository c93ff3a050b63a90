"""The GGUF container: named values and named tensors, located and checked, not yet read.

The `gguf` library knows the tensor types and unpacks them. Its own reader is not used: it takes ten
seconds for the vocabulary of a Gemma 3, and believes every count that a file claims. Here each size
is compared with the bytes that are left before anything is done with it.

**Source:** ggml `docs/gguf.md`, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from equigemma.checkpoint.core._errors import CheckpointError, about
from equigemma.checkpoint.core._stored import aligned


_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4
# A key or a tensor takes at least this many bytes of the header: lengths and types of an empty one.
_MIN_ENTRY = 13
# Types that are numbers one after the other, not packed.
_PLAIN = {1: np.dtype(np.float16), 30: jnp.dtype(jnp.bfloat16)}
# Numbers of 64 bits, which the library does not unpack.
_DOUBLE = 28
# The type whose blocks are a scale in float16 and 32 integers of 8 bits.
_BYTES = 8
# Numbers unpacked at a time: few enough for the processor's cache, and whole blocks of every type.
_PIECE = 1 << 17


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file: a row of blocks of `block` numbers in `block_bytes` bytes.

    `shape` is in the order of numpy, the fastest axis last.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    block: int
    block_bytes: int
    path: Path = Path()
    """The file: a model may be in several."""

    @property
    def dtype(self) -> np.dtype:
        """The narrowest dtype that holds its numbers exactly; float32 for wider ones."""
        return _PLAIN.get(self.kind, np.dtype(np.float32))

    @property
    def in_bytes(self) -> bool:
        """Whether it is in Q8_0, which `GGUFFile.read_blocks` takes apart."""
        return self.kind == _BYTES


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file, and access to its tensors."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads the header only.

        **Raises:** `CheckpointError` if the file is no GGUF, is cut off, or contradicts itself;
        `ImportError` if the package `gguf` is not installed.
        """
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "Reading .gguf files needs the package gguf, which is not installed: "
                'pip install "equigemma[gguf]".'
            ) from error
        with about(path), open(path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise CheckpointError("it does not begin with GGUF, so it is no GGUF file.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                metadata, tensors = _read_header(data, path)
        return cls(path, metadata, tensors)

    def read(self, tensor: Tensor, dtype: np.dtype, pool: ThreadPoolExecutor) -> np.ndarray:
        """A whole tensor in `dtype`, unpacked piece by piece: only the result is ever held in full.

        **Raises:** `CheckpointError` if the library cannot unpack its type, or if the file changed.
        """
        out = aligned((math.prod(tensor.shape),), dtype)

        def unpack(start: int) -> None:
            piece = out[start : start + _PIECE]
            # Damaged scales, or numbers too large for float16, give infinities, not warnings.
            with np.errstate(all="ignore"):
                piece[:] = self._unpack(tensor, start // tensor.block, piece.size // tensor.block)

        list(pool.map(unpack, range(0, out.size, _PIECE)))
        return out.reshape(tensor.shape)

    def read_blocks(self, tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The integers of a tensor in Q8_0, in its shape, and the scale of each 32 of them."""
        count = math.prod(tensor.shape) // tensor.block
        packed = self._packed(tensor, 0, count).reshape(count, tensor.block_bytes)
        scales = np.ascontiguousarray(packed[:, :2]).view(np.float16)
        integers = packed[:, 2:].view(np.int8).reshape(tensor.shape)
        return integers, scales.reshape(*tensor.shape[:-1], -1)

    def _packed(self, tensor: Tensor, first: int, count: int) -> np.ndarray:
        offset = tensor.offset + first * tensor.block_bytes
        packed = np.fromfile(tensor.path, np.uint8, count * tensor.block_bytes, offset=offset)
        if packed.size != count * tensor.block_bytes:
            raise CheckpointError("it became shorter while it was read.")
        return packed

    def _unpack(self, tensor: Tensor, first: int, count: int) -> np.ndarray:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        packed = self._packed(tensor, first, count)
        if tensor.kind == _DOUBLE:
            return packed.view("<f8").astype(np.float32)
        kind = GGMLQuantizationType(tensor.kind)
        try:
            return dequantize(packed[None], kind)[0]
        except NotImplementedError:
            raise CheckpointError(
                f"the tensor {tensor.name} has type {kind.name}, which the installed gguf library "
                "cannot unpack."
            ) from None


class _Cursor:
    """A place in the file that never moves past its end."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def require(self, count: int, size: int, what: str) -> None:
        left = len(self.data) - self.at
        if count * size > left:
            raise CheckpointError(
                f"it is cut off or damaged: {what} takes {count * size} bytes or more at position "
                f"{self.at}, and {left} are left."
            )

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize(f"<{code}")
        self.require(1, size, what)
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += size
        # The decimal number that was meant: 1e-6 rather than 9.999999974752427e-07.
        return float(str(np.float32(value))) if code == "f" else value

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        # The vocabulary is here: a quarter of a million strings, so no call per string but these.
        data, at, end = self.data, self.at, len(self.data)
        length = struct.Struct("<Q")
        texts = []
        try:
            for _ in range(count):
                (size,) = length.unpack_from(data, at)
                at += 8 + size
                if at > end:
                    raise CheckpointError(f"it is cut off or damaged: {what} ends behind the file.")
                texts.append(data[at - size : at].decode())
        except struct.error:
            raise CheckpointError(f"it is cut off: {what} ends behind the file.") from None
        except UnicodeDecodeError:
            raise CheckpointError(f"it is damaged: {what} is not UTF-8.") from None
        self.at = at
        return texts

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind != _ARRAY:
            raise CheckpointError(f"{what} has a type that GGUF does not have: {kind}.")
        kind = self.scalar("I", what)
        count = self.scalar("Q", what)
        if kind == _STRING:
            self.require(count, 8, what)
            return self.strings(count, what)
        if kind not in _SCALARS:
            raise CheckpointError(f"{what} is a list of type {kind}, which is not supported.")
        size = struct.calcsize(f"<{_SCALARS[kind]}")
        self.require(count, size, what)
        self.at += count * size
        return list(
            struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, self.at - count * size)
        )


def _read_header(data: mmap.mmap, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cursor = _Cursor(data, len(_MAGIC))
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        raise CheckpointError(
            f"its version is {version}; versions 2 and 3 are read, in little-endian byte order."
        )
    tensor_count = cursor.scalar("Q", "the number of tensors")
    value_count = cursor.scalar("Q", "the number of values")
    cursor.require(tensor_count + value_count, _MIN_ENTRY, "its table of contents")

    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string("the name of a value")
        if key in metadata:
            raise CheckpointError(f"it is damaged: the value {key} is there twice.")
        kind = cursor.scalar("I", f"the type of {key}")
        metadata[key] = cursor.value(kind, f"the value {key}")

    located = [_read_location(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"general.alignment must be a positive number, got {alignment!r}.")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, kind, shape, offset in located:
        if name in tensors:
            raise CheckpointError(f"it is damaged: the tensor {name} is there twice.")
        block, block_bytes = _block(name, kind, shape)
        size = math.prod(shape) // block * block_bytes
        if start + offset + size > len(data):
            raise CheckpointError(
                f"it is cut off or damaged: the tensor {name} ends at byte "
                f"{start + offset + size}, and the file has {len(data)}."
            )
        tensors[name] = Tensor(name, kind, shape, start + offset, block, block_bytes, path)
    return metadata, tensors


def _read_location(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string("the name of a tensor")
    dimensions = cursor.scalar("I", f"the shape of {name}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise CheckpointError(
            f"it is damaged: the tensor {name} has {dimensions} axes, there should be 1 to "
            f"{_MAX_DIMENSIONS}."
        )
    # GGUF names the fastest axis first.
    shape = tuple(cursor.scalar("Q", f"the shape of {name}") for _ in range(dimensions))[::-1]
    return name, cursor.scalar("I", f"the type of {name}"), shape, cursor.scalar("Q", name)


def _block(name: str, kind: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Numbers in one block of a tensor, and the bytes that hold them."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (KeyError, ValueError):
        raise CheckpointError(
            f"the tensor {name} has type {kind}, which the installed gguf library does not know; "
            "pip install --upgrade gguf may help."
        ) from None
    if min(shape) < 1 or shape[-1] % block:
        raise CheckpointError(
            f"it is damaged: the tensor {name} has shape {list(shape)}; no axis may be empty, and "
            f"the last axis of its type is a multiple of {block}."
        )
    return block, size
