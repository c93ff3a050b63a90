"""Batch shape of `equigemma finetune`: as many rows, and as long ones, as the data fills."""

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from equigemma import train
    from equigemma.config import SigLIPConfig


LENGTH = 512
"""Maximum number of tokens in a row, unless `--length` says otherwise."""

STEP_TOKENS = 2048
"""Maximum number of tokens in a step, unless `--batch-tokens` says otherwise."""

LENGTHS = range(32, LENGTH + 1, 32)
LITTLE = 0.1
"""Share of padding that is none too many: then the largest shape is taken."""

ALIKE = 0.05
"""Difference in padding that does not count: then more tokens in a step are better."""

MANY = 500
"""So many chunks are enough to tell how they fill rows."""


class Shape(NamedTuple):
    """Rows of a batch, and the share of them that is padding, on average over an epoch."""

    length: int
    rows: int
    padding: float = 0.0


def measured(
    chunks: "Sequence[train.Example]", shape: Shape, seed: int, vision: "SigLIPConfig | None"
) -> Shape:
    """The shape with its padding in the first epoch."""
    from equigemma import train

    options = {"length": shape.length, "rows": shape.rows, "vision": vision}
    return shape._replace(padding=train.padding_fraction(chunks, seed=seed, **options))


def chosen(
    chunks: "Sequence[train.Example]",
    *,
    length: int | None,
    micro_batches: int,
    seed: int,
    vision: "SigLIPConfig | None",
) -> Shape:
    """The largest shape if it has little padding, else the shape with the least; of those about as
    good, the one with most tokens.

    **Arguments:** `length`: of the rows, where it is given.

    **Raises:** `ValueError` if no number of rows can be divided into micro-batches.
    """
    from equigemma import train

    longest = max(train.row_length(chunk, vision) for chunk in chunks)
    lengths = [each for each in LENGTHS if each >= min(longest, LENGTH)]
    shapes = [
        Shape(each, rows)
        for each in ([length] if length else lengths)
        for rows in range(micro_batches, max(STEP_TOKENS // each, 1) + 1, micro_batches)
    ]
    if not shapes:
        raise ValueError(
            f"--micro-batches must divide the rows of a batch, of which there are at most "
            f"{max(STEP_TOKENS // (length or LENGTH), 1)}, got {micro_batches}: give "
            f"--batch-tokens as well."
        )
    largest = measured(chunks, max(shapes, key=_size), seed, vision)
    if largest.padding <= LITTLE:
        return largest
    some = list(islice(chunks, MANY))
    found = [measured(some, shape, seed, vision) for shape in shapes]
    least = min(shape.padding for shape in found)
    good = [shape for shape in found if shape.padding <= least + ALIKE]
    return measured(chunks, max(good, key=_size), seed, vision)


def _size(shape: Shape) -> tuple[int, int]:
    return shape.length * shape.rows, shape.length
