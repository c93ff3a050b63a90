"""Weights of prepared and quantized parts, as the leaves of the plain parts that they came from.

Nothing is computed here: a leaf is cut out of joined matrices, and dequantized if need be,
when it is asked for. In whole blocks of 32 it can be had as it is.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from equigemma._kernels import activation_axes, result_axes, weight_axes
from equigemma._prepare import MatrixEinsum
from equigemma.checkpoint.core._stored import Stored, aligned
from equigemma.nn import Einsum
from equigemma.quantize import (
    GroupwiseEinsum,
    GroupwiseEmbedding,
    GroupwiseExperts,
    Int4Groups,
    Int8Einsum,
    Int8Embedding,
    Int8Experts,
    Int8Groups,
)


_BLOCK = 32
_Few = (
    Int8Einsum
    | Int8Experts
    | Int8Embedding
    | GroupwiseEinsum
    | GroupwiseExperts
    | GroupwiseEmbedding
)
Held = MatrixEinsum | _Few


class _Piece(NamedTuple):
    """Some columns: numbers, and for each `group` of them a scale, if they are integers."""

    numbers: np.ndarray
    scale: np.ndarray | None = None
    group: int = 1

    def floats(self) -> np.ndarray:
        wide = self.numbers.astype(np.float32)
        if self.scale is None:
            return wide
        each = np.repeat(self.scale.astype(np.float32), self.group, axis=1)
        return wide * each[:, : wide.shape[1]]

    @property
    def has_blocks(self) -> bool:
        if self.scale is None or self.numbers.shape[1] % _BLOCK:
            return False
        return self.group % _BLOCK == 0 or self.scale.shape[1] == 1

    def block_scales(self) -> np.ndarray:
        assert self.scale is not None
        blocks = self.numbers.shape[1] // _BLOCK
        times = blocks if self.scale.shape[1] == 1 else self.group // _BLOCK
        return np.repeat(self.scale.astype(np.float16), times, axis=1)[:, :blocks]


class Rows(NamedTuple):
    """A matrix with one row for each output, in pieces, and what it counts as."""

    pieces: tuple[_Piece, ...]
    dtype: np.dtype

    @property
    def inputs(self) -> int:
        return sum(piece.numbers.shape[1] for piece in self.pieces)

    @property
    def outputs(self) -> int:
        return len(self.pieces[0].numbers)

    def cut(self, start: int, stop: int | None) -> "Rows":
        pieces = (
            piece._replace(
                numbers=piece.numbers[start:stop],
                scale=None if piece.scale is None else piece.scale[start:stop],
            )
            for piece in self.pieces
        )
        return Rows(tuple(pieces), self.dtype)


def rows_of(part: Any, dtype: jnp.dtype) -> Rows:
    match part:
        case MatrixEinsum():
            found = tuple(_Piece(np.asarray(matrix)) for matrix in part.matrices)
            return Rows(found, np.dtype(part.matrices[0].dtype))
        case Int8Einsum(matrices=matrices, scale=scale):
            pieces = [_row_piece(matrix, scale) for matrix in matrices]
        case Int8Experts(weight=weight, scale=scale) | Int8Embedding(weight=weight, scale=scale):
            pieces = [_row_piece(weight, scale)]
        case GroupwiseEinsum(matrices=matrices):
            pieces = [_group_piece(matrix) for matrix in matrices]
        case _:
            pieces = [_group_piece(part.weight)]
    return Rows(tuple(pieces), np.dtype(dtype))


def _row_piece(weight: Any, scale: Any) -> _Piece:
    numbers = np.asarray(weight).reshape(-1, weight.shape[-1])
    return _Piece(numbers, np.asarray(scale).reshape(-1, 1), numbers.shape[1])


def _group_piece(groups: Int8Groups | Int4Groups) -> _Piece:
    if isinstance(groups, Int4Groups):
        return _Piece(np.asarray(groups.matrix().floats()))
    numbers, scale = np.asarray(groups.weight), np.asarray(groups.scale)
    return _Piece(
        numbers.reshape(-1, groups.inputs), scale.reshape(-1, scale.shape[-1]), groups.group_size
    )


def leaf_of(plain: Any, rows: Rows) -> Stored:
    """The weight of a plain part, whose shape is known."""
    shape, axes, by_output = plain.weight.shape, "VD", "VD"
    if isinstance(plain, Einsum):
        axes, outputs = weight_axes(plain.eqn), result_axes(plain.eqn)
        by_output = outputs + "".join(x for x in activation_axes(plain.eqn) if x not in outputs)
    sizes = dict(zip(axes, shape, strict=True))

    def read(dtype: np.dtype) -> np.ndarray:
        floats = np.concatenate([piece.floats() for piece in rows.pieces], axis=1)
        floats = floats.reshape([sizes[axis] for axis in by_output])
        out = aligned(shape, np.dtype(dtype))
        out[...] = floats.transpose([by_output.index(axis) for axis in axes])
        return out

    def blocks() -> tuple[np.ndarray, np.ndarray]:
        numbers = np.concatenate([piece.numbers for piece in rows.pieces], axis=1)
        return numbers, np.concatenate([piece.block_scales() for piece in rows.pieces], axis=1)

    if all(piece.has_blocks for piece in rows.pieces):
        return Stored(shape, np.dtype(np.int8), read, blocks=blocks)
    return Stored(shape, rows.dtype, read)
