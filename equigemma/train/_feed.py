"""Batches without end in an order that a seed decides, to be taken up again at any of them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from equigemma.train._batch import Batch, Example, assemble, cut, put


class Place(NamedTuple):
    """Where a feed stands: all that must be kept to go on with the next batch."""

    epoch: int = 0
    """How often all examples have been seen."""
    piece: int = 0
    """How many of the pieces of this epoch's order have been seen."""


def feed(
    examples: Iterable[Example],
    *,
    length: int,
    rows: int,
    seed: int = 0,
    start: Place = Place(),
    epochs: int | None = None,
) -> Iterator[tuple[Batch, Place]]:
    """Packed batches in a new order in each epoch, each with the place to go on from after it.

    Examples longer than `length` are cut before they are put in order, so pieces of one long text
    come at different times. No batch holds examples of two epochs.

    **Arguments:** `start`: a place that came with a batch: what follows is what followed then.
    `epochs`: by default batches never end.

    **Raises:** `ValueError` if there is nothing to learn in the examples, or if `length` or `rows`
    leave no room.
    """
    pieces = list(cut(examples, length))
    if not pieces:
        raise ValueError("There is nothing to learn: no example has a token with a predecessor.")
    for filled, place in _filled(pieces, length, rows, seed, start, epochs):
        yield assemble(filled, length, rows), place


def count_batches(
    examples: Iterable[Example], *, length: int, rows: int, seed: int = 0, epochs: int = 1
) -> int:
    """How many batches `feed` gives for the same arguments; nothing is assembled."""
    pieces = list(cut(examples, length))
    return sum(1 for _ in _filled(pieces, length, rows, seed, Place(), epochs))


def split(
    examples: Iterable[Example], share: float, *, length: int, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Pieces to learn from and, drawn by `seed`, a share of them that is held out.

    Examples longer than `length` are cut first, so that also one long text can be split. At least
    one piece is held out if the share is above 0.

    **Raises:** `ValueError` if the share is not in [0, 1), or leaves nothing to learn from.
    """
    if not 0 <= share < 1:
        raise ValueError(f"The share that is held out must be in [0, 1), got {share}.")
    pieces = list(cut(examples, length))
    count = max(round(share * len(pieces)), 1 if share else 0)
    if count >= len(pieces):
        raise ValueError(
            f"There are {len(pieces)} pieces of text, too few to hold out {count}: more data, or a "
            f"smaller length or share."
        )
    order = np.random.default_rng([seed, _SPLIT]).permutation(len(pieces))
    learned, held_out = np.sort(order[count:]), np.sort(order[:count])
    return [pieces[index] for index in learned], [pieces[index] for index in held_out]


# Each use of the seed draws from a stream of its own.
_SPLIT, _ORDER = 0, 1


def _filled(
    pieces: Sequence[Example],
    length: int,
    rows: int,
    seed: int,
    place: Place,
    epochs: int | None,
) -> Iterator[tuple[list[list[Example]], Place]]:
    epoch, first = place
    while epochs is None or epoch < epochs:
        order = np.random.default_rng([seed, _ORDER, epoch]).permutation(len(pieces))
        filled: list[list[Example]] = []
        for index in range(first, len(pieces)):
            piece = pieces[order[index]]
            if not put(filled, piece, length, rows):
                yield filled, Place(epoch, index)
                filled = []
                put(filled, piece, length, rows)
        epoch, first = epoch + 1, 0
        if filled:
            yield filled, Place(epoch, 0)
