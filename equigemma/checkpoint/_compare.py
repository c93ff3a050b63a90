"""Verification of a written checkpoint: each weight equals the model's, as far as its dtype can."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._keymap import leaf_shapes, leaves, plan
from equigemma.checkpoint.core._layout import without_unused
from equigemma.checkpoint.core._stored import Progress
from equigemma.checkpoint.hf._rules import rules
from equigemma.nn import Transformer


# Numbers that share a scale in the 8-bit type of GGUF, and the steps from zero to the largest.
_BLOCK, _STEPS = 32, 127
# Numbers compared at a time: as float32, whole weights would take several times their room.
_PIECE = 1 << 20


class Loss(NamedTuple):
    """What may be lost on the way besides the bits that a dtype does not have."""

    shifted_norms: bool = False
    """What adding 1 to the scale of a norm and taking it off again does to a float32."""
    packed_rows: bool = False
    """Half a step, of 127 to the largest of 32 numbers, in matrices whose rows can be packed."""


def compare(
    model: Transformer, written: Transformer, loss: Loss, progress: Progress | None
) -> None:
    """Reads everything back: each weight must be the model's, rounded to the dtype it is stored in.

    **Raises:** `CheckpointError` naming the weights that differ.
    """
    model, written = without_unused(model), without_unused(written)
    shapes = leaf_shapes(written)
    # Matrices are packed by rows, so they are compared in the layout that has them.
    by_leaf = shapes == leaf_shapes(model) and not loss.packed_rows
    ours, theirs = ((_weights if by_leaf else _matrices)(side) for side in (model, written))
    theirs = {name: (read, dtype) for name, read, dtype in theirs}
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    wrong, done = [], 0
    for name, read, _ in ours:
        read_theirs, dtype = theirs[name]
        array = read()
        if not _agree(array, read_theirs(), dtype, loss):
            wrong.append(name)
        done += array.size
        if progress is not None:
            progress(done, total, name)
    if wrong:
        raise CheckpointError(
            f"what was written is not what was to be written, in {len(wrong)} weight(s): "
            + ", ".join(wrong[:5])
            + "."
        )


_Weight = tuple[str, Callable[[], np.ndarray], np.dtype]
"""Name, numbers and stored dtype of a weight."""


def _weights(model: Transformer) -> Iterator[_Weight]:
    for path, leaf in leaves(model):
        yield path, partial(np.asarray, leaf), np.dtype(leaf.dtype)


def _matrices(model: Transformer) -> Iterator[_Weight]:
    """The same in the layout of other formats, which does not depend on the model's own."""
    weights = dict(leaves(model))
    # Matrices of one leaf follow each other: it is read once for all of them.
    read = lru_cache(maxsize=1)(lambda path: np.asarray(weights[path]))

    def matrix(entry: Any, place: int) -> np.ndarray:
        return entry.part_to_theirs(entry.parts(read(entry.path))[place])

    for entry in plan(leaf_shapes(model), rules(model.config)):
        for place, key in enumerate(entry.keys):
            yield key, partial(matrix, entry, place), np.dtype(weights[entry.path].dtype)


def _agree(ours: np.ndarray, theirs: np.ndarray, dtype: np.dtype, loss: Loss) -> bool:
    width = ours.shape[-1]
    rows = max(1, _PIECE // width)
    is_packed = loss.packed_rows and ours.ndim > 1 and width % _BLOCK == 0
    is_shifted = loss.shifted_norms and ours.ndim == 1
    ours, theirs = ours.reshape(-1, width), theirs.reshape(-1, width)
    for start in range(0, len(ours), rows):
        our, their = (array[start : start + rows].astype(np.float32) for array in (ours, theirs))
        with np.errstate(over="ignore", invalid="ignore"):
            if np.array_equal(our.astype(dtype).astype(np.float32), their, equal_nan=True):
                continue
            if is_packed:
                bound = _half_steps(our)
            elif is_shifted:
                # A unit in the last place of 1 + scale.
                bound = 2.0**-23 * np.maximum(1.0, abs(our))
            else:
                return False
            if not (abs(their - our) <= bound).all():
                return False
    return True


def _half_steps(array: np.ndarray) -> np.ndarray:
    """How far each number may move when its row is packed."""
    blocks = abs(array).reshape(-1, _BLOCK).max(axis=-1, keepdims=True)
    # Besides half a step, what 11 bits, or the least of float16, lose of the scale.
    bound = blocks * (0.5 / _STEPS + 2.0**-11) + _STEPS * 2.0**-25
    return np.broadcast_to(bound, (len(blocks), _BLOCK)).reshape(array.shape)
