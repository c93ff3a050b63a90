"""Examples as batches: in their order, or without end in one that a seed decides.

How one batch is put together is in `_batch.py`, and of texts with images in `_images.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from equigemma._arguments import as_integer, as_number, described
from equigemma.config import SigLIPConfig
from equigemma.train._batch import (
    Batch,
    Example,
    as_length,
    as_rows,
    assemble,
    check_vocabulary,
    cut,
    each_example,
    put,
)
from equigemma.train._checks import check_function, check_vision
from equigemma.train._images import ImageBatch, added_tokens, check_fits, with_images


class Place(NamedTuple):
    """Position of a feed in its data: all that is needed to resume at the next batch."""

    epoch: int = 0
    """How often all examples have been seen."""
    piece: int = 0
    """How many of the pieces of this epoch's order have been seen."""


def pack(
    examples: Iterable[Example],
    length: int,
    rows: int,
    *,
    vision: SigLIPConfig | None = None,
    read: Callable[[Any], np.ndarray] = np.asarray,
) -> Iterator[Batch | ImageBatch]:
    """Batches of `rows` x `length` tokens, filled with examples in their order.

    Each example goes to the first row with room for it, so little is wasted and nothing is split;
    one that is longer than `length` is cut, see `cut`. The last batch may have empty rows.

    **Arguments:** `vision`, `read`: for examples with images, as in `feed`.

    **Raises:** `ValueError` if `length` is below 2, too short for a token and its successor.
    """
    rows_of = _rows(examples, length, rows, vision, read)
    return (rows_of.batch(filled) for filled, _ in rows_of.filled(range(len(rows_of.pieces)), 0))


def feed(
    examples: Iterable[Example],
    *,
    length: int,
    rows: int,
    seed: int = 0,
    start: Place = Place(),
    epochs: int | None = None,
    vocab: int | None = None,
    vision: SigLIPConfig | None = None,
    read: Callable[[Any], np.ndarray] = np.asarray,
) -> Iterator[tuple[Batch | ImageBatch, Place]]:
    """Packed batches in a new order in each epoch, each with the place to go on from after it.

    Examples longer than `length` are cut before they are put in order, so pieces of one long text
    come at different times. No batch holds examples of two epochs.

    **Arguments:**

    - `start`: a place that came with a batch: what follows is what followed then.
    - `epochs`: by default batches never end.
    - `vocab`: number of ids that the model knows, `model.config.vocab`; larger ones are refused.
    - `vision`: of a model that reads images, for examples that have some. Then each row is one
      example, and a batch is an `ImageBatch`, for `image_loss`.
    - `read`: what gives `uint8[height width 3]` for an image of an example, such as
      `equigemma.images.as_rgb` for a path. It is called when a batch needs it.

    **Raises:** `ValueError` if there is nothing to learn in the examples, if `length` or `rows`
    leave no room, for ids outside of `vocab`, for a `start` that these examples do not have, or if
    there are images without `vision`; `TypeError` for arguments of another type. All but the images
    are checked before the first batch is asked for.
    """
    examples = list(each_example(examples))
    if vocab is not None:
        check_vocabulary(examples, vocab)
    rows_of = _rows(examples, length, rows, vision, read)
    if not rows_of.pieces:
        raise ValueError("There is nothing to learn: no example has a token with a predecessor.")
    order = rows_of.shuffled(seed, start, epochs)
    return ((rows_of.batch(filled), place) for filled, place in order)


def count_batches(
    examples: Iterable[Example],
    *,
    length: int,
    rows: int,
    seed: int = 0,
    epochs: int = 1,
    vision: SigLIPConfig | None = None,
) -> int:
    """Number of batches of `feed` for the same arguments; nothing is assembled."""
    rows_of = _rows(examples, length, rows, vision, np.asarray)
    return sum(1 for _ in rows_of.shuffled(seed, Place(), epochs))


def padding(
    examples: Iterable[Example],
    *,
    length: int,
    rows: int,
    seed: int = 0,
    epochs: int = 1,
    vision: SigLIPConfig | None = None,
) -> float:
    """The share of padding in all batches that `feed` gives for the same arguments; nothing is
    assembled."""
    rows_of = _rows(examples, length, rows, vision, np.asarray)
    batches, tokens = 0, 0
    for filled, _ in rows_of.shuffled(seed, Place(), epochs):
        batches += 1
        tokens += sum(row_length(piece, vision) for row in filled for piece in row)
    return 1 - tokens / (batches * rows * length) if batches else 0.0


def row_length(example: Example, vision: SigLIPConfig | None = None) -> int:
    """The places of a row that an example takes, soft tokens of its images included."""
    extra = 0 if vision is None else len(example.images) * added_tokens(vision)
    return len(example.tokens) + extra


def split(
    examples: Iterable[Example], share: float, *, length: int, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Training examples and, drawn by `seed`, a share of them as validation set.

    Examples longer than `length` are cut first, so that also one long text can be split. At least
    one is for validation if the share is above 0.

    **Raises:** `ValueError` if the share is not in [0, 1), or leaves nothing to learn from.
    """
    seed = as_integer("seed", seed, least=0)
    if not 0 <= as_number("share", share) < 1:
        raise ValueError(f"The share for validation must be in [0, 1), got {share}.")
    pieces = list(cut(examples, length))
    count = max(round(share * len(pieces)), 1 if share else 0)
    if count >= len(pieces):
        raise ValueError(
            f"There are {len(pieces)} pieces of text, too few to hold out {count}: more data, or a "
            f"smaller length or share."
        )
    order = np.random.default_rng([seed, _SPLIT]).permutation(len(pieces))
    learned, validation = np.sort(order[count:]), np.sort(order[:count])
    return [pieces[index] for index in learned], [pieces[index] for index in validation]


# Each use of the seed draws from a stream of its own.
_SPLIT, _ORDER = 0, 1


def _rows(
    examples: Iterable[Example],
    length: int,
    rows: int,
    vision: SigLIPConfig | None,
    read: Callable[[Any], np.ndarray],
) -> "_Rows":
    rows = as_rows(rows)
    check_vision(vision)
    check_function("read", read, "an image")
    length = as_length(length)
    return _Rows(list(cut(examples, length)), length, rows, vision, read)


class _Rows(NamedTuple):
    """Which pieces share a batch, and what it is made of."""

    pieces: Sequence[Example]
    length: int
    rows: int
    vision: SigLIPConfig | None
    read: Callable[[Any], np.ndarray]

    def shuffled(
        self, seed: int, start: Place, epochs: int | None
    ) -> Iterator[tuple[list[list[Example]], Place]]:
        """The rows of every batch, and the place after it."""
        seed = as_integer("seed", seed, least=0)
        epochs = None if epochs is None else as_integer("epochs", epochs, least=0)
        if not (isinstance(start, tuple) and len(start) == 2):
            raise TypeError(
                f"`start` must be a train.Place, as it came with a batch; got {described(start)}."
            )
        for name, value in zip(Place._fields, start, strict=True):
            as_integer(f"start.{name}", value, least=0)
        if start[1] >= len(self.pieces) > 0:
            raise ValueError(
                f"`start` is after {start[1]} pieces of an epoch, and these examples have "
                f"{len(self.pieces)}: it is of other examples, or of another length."
            )
        return self._shuffled(seed, Place(*start), epochs)

    def _shuffled(
        self, seed: int, place: Place, epochs: int | None
    ) -> Iterator[tuple[list[list[Example]], Place]]:
        epoch, first = place
        while epochs is None or epoch < epochs:
            order = np.random.default_rng([seed, _ORDER, epoch]).permutation(len(self.pieces))
            for filled, after in self.filled(order, first):
                is_last = after == len(self.pieces)
                yield filled, Place(epoch + 1, 0) if is_last else Place(epoch, after)
            epoch, first = epoch + 1, 0

    def filled(
        self, order: Sequence[int] | np.ndarray, first: int
    ) -> Iterator[tuple[list[list[Example]], int]]:
        """The rows of batches of pieces in this order, from the first on, and where each ends."""
        filled: list[list[Example]] = []
        for index in range(first, len(self.pieces)):
            piece = self.pieces[order[index]]
            if not self._put(filled, piece):
                yield filled, index
                filled = []
                self._put(filled, piece)
        if filled:
            yield filled, len(self.pieces)

    def _put(self, filled: list[list[Example]], piece: Example) -> bool:
        if self.vision is None:
            return put(filled, piece, self.length, self.rows)
        check_fits(piece, self.vision, self.length)
        # A row is full with one: what may see what is not told by a number of the text.
        return put(filled, piece, len(piece.tokens), self.rows)

    def batch(self, filled: list[list[Example]]) -> Batch | ImageBatch:
        """The arrays of a batch."""
        if self.vision is None:
            return assemble(filled, self.length, self.rows)
        examples = [example for row in filled for example in row]
        # The same shape for all batches: each further one would be compiled anew.
        most = max(len(piece.images) for piece in self.pieces)
        shape = {"length": self.length, "rows": self.rows, "most": max(most, 1)}
        return with_images(examples, self.vision, **shape, read=self.read)
