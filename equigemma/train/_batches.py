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
    check_vocabulary,
    collate,
    each_example,
    place_first_fit,
    split_long,
)
from equigemma.train._checks import check_function, check_vision
from equigemma.train._images import ImageBatch, added_tokens, check_fits, collate_images


class DataState(NamedTuple):
    """Position in the shuffled data: all that is needed to resume at the next batch."""

    epoch: int = 0
    """How often all examples have been seen."""
    chunk: int = 0
    """How many of the chunks of this epoch's order have been seen."""


def pack(
    examples: Iterable[Example],
    *,
    length: int,
    rows: int,
    vision: SigLIPConfig | None = None,
    read: Callable[[Any], np.ndarray] = np.asarray,
) -> Iterator[Batch | ImageBatch]:
    """Batches of `rows` x `length` tokens, filled with examples in their order.

    Each example goes to the first row with room for it, so little is wasted and nothing is split;
    one that is longer than `length` is cut, see `split_long`. The last batch may have empty rows.

    **Arguments:**

    - `examples`: to be packed.
    - `length`: tokens of each row, at least 2.
    - `rows`: of each batch.
    - `vision`, `read`: for examples with images, as in `batches`.

    **Returns:** an iterator over batches; an `ImageBatch` each with `vision`, else a `Batch`.

    **Raises:** `ValueError` if `length` is below 2, too short for a token and its successor.
    """
    rows_of = _rows(examples, length, rows, vision, read)
    return (rows_of.batch(filled) for filled, _ in rows_of.filled(range(len(rows_of.chunks)), 0))


def batches(
    examples: Iterable[Example],
    *,
    length: int,
    rows: int,
    seed: int = 0,
    start: DataState = DataState(),
    epochs: int | None = None,
    vocab: int | None = None,
    vision: SigLIPConfig | None = None,
    read: Callable[[Any], np.ndarray] = np.asarray,
) -> Iterator[tuple[Batch | ImageBatch, DataState]]:
    """Packed batches in a new order in each epoch, each with the state to resume from after it.

    Examples longer than `length` are cut before they are put in order, so chunks of one long text
    come at different times. No batch holds examples of two epochs.

    **Arguments:**

    - `examples`: to be trained on; all are held in memory.
    - `length`: tokens of each row, at least 2.
    - `rows`: of each batch.
    - `seed`: of the order.
    - `start`: the state that came with a batch: what follows is what followed then.
    - `epochs`: by default batches never end.
    - `vocab`: number of ids that the model knows, `model.config.vocab`; larger ones are refused.
    - `vision`: of a model that reads images, for examples that have some. Then each row is one
      example, and a batch is an `ImageBatch`, for `image_loss`.
    - `read`: what gives `uint8[height width 3]` for an image of an example, such as
      `equigemma.images.as_rgb` for a path. It is called when a batch needs it.

    **Returns:** an iterator over pairs of a batch and a `DataState`.

    **Raises:** `ValueError` if there is nothing to train on in the examples, if `length` or `rows`
    leave no room, for ids outside of `vocab`, for a `start` that these examples do not have, or if
    there are images without `vision`; `TypeError` for arguments of another type. All but the images
    are checked before the first batch is asked for.
    """
    examples = list(each_example(examples))
    if vocab is not None:
        check_vocabulary(examples, vocab)
    rows_of = _rows(examples, length, rows, vision, read)
    if not rows_of.chunks:
        raise ValueError("There is nothing to train on: no example has a token with a predecessor.")
    order = rows_of.shuffled(seed, start, epochs)
    return ((rows_of.batch(filled), data_state) for filled, data_state in order)


def count_batches(
    examples: Iterable[Example],
    *,
    length: int,
    rows: int,
    seed: int = 0,
    epochs: int = 1,
    vision: SigLIPConfig | None = None,
) -> int:
    """Number of batches of `batches` for the same arguments; nothing is assembled.

    **Arguments:** those of `batches`; `epochs` is a number.

    **Returns:** how many batches there are in all epochs.
    """
    rows_of = _rows(examples, length, rows, vision, np.asarray)
    return sum(1 for _ in rows_of.shuffled(seed, DataState(), epochs))


def padding_fraction(
    examples: Iterable[Example],
    *,
    length: int,
    rows: int,
    seed: int = 0,
    epochs: int = 1,
    vision: SigLIPConfig | None = None,
) -> float:
    """The fraction of padding in the batches of `batches` for the same arguments; nothing is
    assembled.

    **Arguments:** those of `batches`; `epochs` is a number.

    **Returns:** padding tokens over all tokens of all rows, in [0, 1].
    """
    rows_of = _rows(examples, length, rows, vision, np.asarray)
    batches, tokens = 0, 0
    for filled, _ in rows_of.shuffled(seed, DataState(), epochs):
        batches += 1
        tokens += sum(row_length(chunk, vision) for row in filled for chunk in row)
    return 1 - tokens / (batches * rows * length) if batches else 0.0


def row_length(example: Example, vision: SigLIPConfig | None = None) -> int:
    """Number of tokens of a row that an example takes, soft tokens of its images included.

    **Arguments:**

    - `example`: as a batch would hold it, not cut.
    - `vision`: of a model that reads images.

    **Returns:** a number of tokens.
    """
    extra = 0 if vision is None else len(example.images) * added_tokens(vision)
    return len(example.tokens) + extra


def split(
    examples: Iterable[Example], fraction: float, *, length: int, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Training examples and a validation set, a fraction of them drawn by `seed`.

    Examples longer than `length` are cut first, so that also one long text can be split. At least
    one is for validation if the fraction is above 0.

    **Arguments:**

    - `examples`: all there are.
    - `fraction`: how much of them is for validation, in [0, 1).
    - `length`: the most tokens of an example, see `split_long`.
    - `seed`: of the draw.

    **Returns:** both lists, in the order of the examples.

    **Raises:** `ValueError` if the fraction is not in [0, 1), or leaves nothing to train on.
    """
    seed = as_integer("seed", seed, least=0)
    if not 0 <= as_number("fraction", fraction) < 1:
        raise ValueError(f"The validation fraction must be in [0, 1), got {fraction}.")
    chunks = list(split_long(examples, length))
    count = max(round(fraction * len(chunks)), 1 if fraction else 0)
    if count >= len(chunks):
        raise ValueError(
            f"There are {len(chunks)} chunks of text, too few to hold out {count}: more data, or a "
            f"smaller length or fraction."
        )
    order = np.random.default_rng([seed, _SPLIT]).permutation(len(chunks))
    train, validation = np.sort(order[count:]), np.sort(order[:count])
    return [chunks[index] for index in train], [chunks[index] for index in validation]


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
    return _Rows(list(split_long(examples, length)), length, rows, vision, read)


class _Rows(NamedTuple):
    """Which chunks share a batch, and what it is made of."""

    chunks: Sequence[Example]
    length: int
    rows: int
    vision: SigLIPConfig | None
    read: Callable[[Any], np.ndarray]

    def shuffled(
        self, seed: int, start: DataState, epochs: int | None
    ) -> Iterator[tuple[list[list[Example]], DataState]]:
        """The rows of every batch, and the state after it."""
        seed = as_integer("seed", seed, least=0)
        epochs = None if epochs is None else as_integer("epochs", epochs, least=0)
        if not (isinstance(start, tuple) and len(start) == 2):
            raise TypeError(
                f"`start` must be a train.DataState, as it came with a batch; got "
                f"{described(start)}."
            )
        for name, value in zip(DataState._fields, start, strict=True):
            as_integer(f"start.{name}", value, least=0)
        if start[1] >= len(self.chunks) > 0:
            raise ValueError(
                f"`start` is after {start[1]} chunks of an epoch, and these examples have "
                f"{len(self.chunks)}: it is of other examples, or of another length."
            )
        return self._shuffled(seed, DataState(*start), epochs)

    def _shuffled(
        self, seed: int, data_state: DataState, epochs: int | None
    ) -> Iterator[tuple[list[list[Example]], DataState]]:
        epoch, first = data_state
        while epochs is None or epoch < epochs:
            order = np.random.default_rng([seed, _ORDER, epoch]).permutation(len(self.chunks))
            for filled, after in self.filled(order, first):
                is_last = after == len(self.chunks)
                yield filled, DataState(epoch + 1, 0) if is_last else DataState(epoch, after)
            epoch, first = epoch + 1, 0

    def filled(
        self, order: Sequence[int] | np.ndarray, first: int
    ) -> Iterator[tuple[list[list[Example]], int]]:
        """The rows of batches of chunks in this order, from the first on, and where each ends."""
        filled: list[list[Example]] = []
        for index in range(first, len(self.chunks)):
            chunk = self.chunks[order[index]]
            if not self._put(filled, chunk):
                yield filled, index
                filled = []
                self._put(filled, chunk)
        if filled:
            yield filled, len(self.chunks)

    def _put(self, filled: list[list[Example]], chunk: Example) -> bool:
        if self.vision is None:
            return place_first_fit(filled, chunk, self.length, self.rows)
        check_fits(chunk, self.vision, self.length)
        # A row is full with one: what may see what is not told by a number of the text.
        return place_first_fit(filled, chunk, len(chunk.tokens), self.rows)

    def batch(self, filled: list[list[Example]]) -> Batch | ImageBatch:
        """The arrays of a batch."""
        if self.vision is None:
            return collate(filled, self.length, self.rows)
        examples = [example for row in filled for example in row]
        # The same shape for all batches: each further one would be compiled anew.
        max_images = max(len(chunk.images) for chunk in self.chunks)
        shape = {"length": self.length, "rows": self.rows, "max_images": max(max_images, 1)}
        return collate_images(examples, self.vision, **shape, read=self.read)
