"""A model prepared for decoding, as the plain one that formats describe.

Nothing is computed here: the leaves of the plain model are cut out of joined matrices, and widened
if they are in 8 bits, when they are asked for. In whole blocks of 32 they can be had as they are.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._kernels import activation_axes, result_axes, weight_axes
from equigemma.checkpoint._linen import skeleton
from equigemma.checkpoint._stored import Stored, aligned
from equigemma.nn import Einsum, Embedding, Transformer
from equigemma.nn._attention import SplitProjection, StackedProjection
from equigemma.prepare import JoinedProjection, MatrixEinsum
from equigemma.quantize import (
    ByteGroups,
    GroupEinsum,
    GroupEmbedding,
    GroupExperts,
    NibbleGroups,
    QuantEinsum,
    QuantEmbedding,
    QuantExperts,
)


_BLOCK = 32
_Few = QuantEinsum | QuantExperts | QuantEmbedding | GroupEinsum | GroupExperts | GroupEmbedding
_Held = MatrixEinsum | _Few


def as_plain(model: Transformer) -> Transformer:
    """`model` with every part as it was before `prepare` and `quantize`, if they knew it.

    Leaves of their parts are `Stored`; those in whole 8-bit blocks have the dtype int8.
    """
    parts = jax.tree.leaves(model, is_leaf=lambda part: isinstance(part, _Held))
    if not any(isinstance(part, _Held) for part in parts):
        return model
    kinds = SplitProjection | StackedProjection | Einsum | Embedding
    return jax.tree.map(
        lambda plain, part: _plain(plain, part, model.dtype),
        skeleton(model.config),
        model,
        is_leaf=lambda part: isinstance(part, kinds),
    )


def _plain(plain: Any, part: Any, dtype: jnp.dtype) -> Any:
    match plain, part:
        case SplitProjection(), JoinedProjection(qkv=qkv) if isinstance(qkv, _Held):
            rows = _rows_of(qkv, dtype)
            assert isinstance(plain.q, Einsum)
            end = math.prod(plain.q.weight.shape) // rows.inputs
            leaves = _leaf(plain.q, rows.cut(0, end)), _leaf(plain.kv, rows.cut(end, None))
            return eqx.tree_at(lambda p: (p.q.weight, p.kv.weight), plain, leaves)
        case StackedProjection(), JoinedProjection(qkv=qkv) if isinstance(qkv, _Held):
            leaf = _leaf(plain.qkv, _rows_of(qkv, dtype))
            return eqx.tree_at(lambda p: p.qkv.weight, plain, leaf)
        case ((SplitProjection() | StackedProjection()), _) if type(plain) is type(part):
            return jax.tree.map(
                lambda one, other: _plain(one, other, dtype),
                plain,
                part,
                is_leaf=lambda one: isinstance(one, Einsum),
            )
        case ((Einsum() | Embedding()), _) if isinstance(part, _Held):
            leaf = _leaf(plain, _rows_of(part, dtype))
            return eqx.tree_at(lambda p: p.weight, plain, leaf)
    return part


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


class _Rows(NamedTuple):
    """A matrix with one row for each output, in pieces, and what it counts as."""

    pieces: tuple[_Piece, ...]
    dtype: np.dtype

    @property
    def inputs(self) -> int:
        return sum(piece.numbers.shape[1] for piece in self.pieces)

    def cut(self, start: int, stop: int | None) -> "_Rows":
        pieces = (
            piece._replace(
                numbers=piece.numbers[start:stop],
                scale=None if piece.scale is None else piece.scale[start:stop],
            )
            for piece in self.pieces
        )
        return _Rows(tuple(pieces), self.dtype)


def _rows_of(part: Any, dtype: jnp.dtype) -> _Rows:
    match part:
        case MatrixEinsum():
            found = tuple(_Piece(np.asarray(matrix)) for matrix in part.matrices)
            return _Rows(found, np.dtype(part.matrices[0].dtype))
        case QuantEinsum(matrices=matrices, scale=scale):
            pieces = [_row_piece(matrix, scale) for matrix in matrices]
        case QuantExperts(weight=weight, scale=scale) | QuantEmbedding(weight=weight, scale=scale):
            pieces = [_row_piece(weight, scale)]
        case GroupEinsum(matrices=matrices):
            pieces = [_group_piece(matrix) for matrix in matrices]
        case _:
            pieces = [_group_piece(part.weight)]
    return _Rows(tuple(pieces), np.dtype(dtype))


def _row_piece(weight: Any, scale: Any) -> _Piece:
    numbers = np.asarray(weight).reshape(-1, weight.shape[-1])
    return _Piece(numbers, np.asarray(scale).reshape(-1, 1), numbers.shape[1])


def _group_piece(groups: ByteGroups | NibbleGroups) -> _Piece:
    if isinstance(groups, NibbleGroups):
        return _Piece(np.asarray(groups.matrix().floats()))
    numbers, scale = np.asarray(groups.weight), np.asarray(groups.scale)
    return _Piece(
        numbers.reshape(-1, groups.inputs), scale.reshape(-1, scale.shape[-1]), groups.group
    )


def _leaf(plain: Any, rows: _Rows) -> Stored:
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
