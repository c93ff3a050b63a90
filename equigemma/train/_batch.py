"""Training batches: rows of tokens, their targets and loss weights."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import as_integer, described
from equigemma._typing import Array, Bool, Float32, Int


class Batch(eqx.Module):
    """Rows of equal length, each packed with one or more texts.

    Texts of a row do not attend to each other: positions start at 0 with each, and a token attends
    within its own `segments` number only. Padding after the last text has segment −1.
    """

    tokens: Int[Array, "*B L"]
    targets: Int[Array, "*B L"]  # the token that should follow
    weights: Float32[Array, "*B L"]  # of each target's loss; 0: not trained on
    positions: Int[Array, "*B L"]  # within the text; -1 where there is none
    segments: Int[Array, "*B L"]  # which text of its row; -1 where there is none

    def mask(self) -> Bool[Array, "*B L L"]:
        """True where a token attends: not ahead, and within its own text."""
        segment, position = self.segments, self.positions
        same = segment[..., :, None] == segment[..., None, :]
        not_ahead = position[..., None, :] <= position[..., :, None]
        return same & not_ahead & (segment >= 0)[..., None, :]


class ImageBatch(eqx.Module):
    """Rows of equal length with one text each, about images. Id −2 − k is soft token k there."""

    tokens: Int[Array, "*B L"]  # as `nn.insert_image_tokens` gives them
    targets: Int[Array, "*B L"]  # the token that should follow
    weights: Float32[Array, "*B L"]  # of each target's loss; 0: not trained on
    positions: Int[Array, "*B L"]  # -1 after the end of the text
    pixels: Float32[Array, "*B I size size 3"]  # as `nn.preprocess_images` gives them

    @property
    def segments(self) -> None:
        """A row is one text: who attends to whom follows from positions and images."""


@dataclass(frozen=True, eq=False)
class Example:
    """One text as token ids, and the weight of each token as a target.

    A prompt that is not trained on has weight 0; the first token has no predecessor that could
    be asked for it, so its weight does not count.
    """

    tokens: Sequence[int] | np.ndarray
    weights: Sequence[float] | np.ndarray
    images: Sequence[Any] = ()
    """One for each token that stands for an image, see `collate_images`."""

    def __post_init__(self):
        tokens, weights = _row("tokens", self.tokens), _row("weights", self.weights)
        if not tokens.size or tokens.dtype.kind not in "iu":
            got = f"{tokens.size} of dtype {tokens.dtype}" if tokens.size else "none"
            raise ValueError(f"An example needs integer token ids, at least one; got {got}.")
        if (largest := int(tokens.max())) > _LARGEST_ID:
            raise ValueError(f"Token ids have 32 bits; an example has {largest}.")
        if isinstance(self.images, str | bytes) or not isinstance(self.images, Sized):
            raise TypeError(
                f"`images` of an example must be a list with one for each token that stands for an "
                f"image, got {described(self.images)}."
            )
        if weights.shape != tokens.shape or weights.dtype.kind not in "biuf":
            raise ValueError(
                f"An example needs one number as the weight of each token, got {tokens.size} "
                f"tokens and {weights.size} weights of dtype {weights.dtype}."
            )
        if tokens.min() < 0:
            at = int(tokens.argmin())
            raise ValueError(f"Token ids are 0 or more; token {at} of an example is {tokens[at]}.")
        if not np.isfinite(weights).all():
            at = int(np.isfinite(weights).argmin())
            raise ValueError(f"Weights are finite; that of token {at} is {weights[at]}.")


def check_vocabulary(examples: Iterable[Example], vocab: int) -> None:
    """Refuses token ids that a model has no embedding for.

    **Arguments:**

    - `examples`: to be trained on.
    - `vocab`: number of ids that the model knows, `model.config.vocab`.

    **Raises:** `ValueError` for the first example that has one, counted from 0.
    """
    vocab = as_integer("vocab", vocab, least=1)
    for number, example in enumerate(each_example(examples)):
        if (largest := int(np.max(example.tokens))) >= vocab:
            raise ValueError(
                f"Example {number} has the token id {largest}, and the model's vocabulary ends at "
                f"{vocab - 1}: the tokenizer is of another model, or has tokens that were added."
            )


_LARGEST_ID = np.iinfo(np.int32).max


def _row(name: str, values: Any) -> np.ndarray:
    if values is None or isinstance(values, str | bytes):
        raise TypeError(
            f"`{name}` of an example must be a row of numbers, got {described(values)}."
        )
    try:
        row = np.asarray(values)
    except ValueError:  # rows of several lengths
        row = np.zeros((0, 0))
    if row.ndim != 1:
        raise ValueError(f"The {name} of an example are one row of numbers; got {row.ndim} axes.")
    return row


def each_example(examples: Any) -> Iterator[Example]:
    """The examples of a list, or of what else can be gone through.

    **Raises:** `TypeError` for anything else, when it comes to it.
    """
    makers = "data.read, data.from_text and train.Example(tokens, weights) make them"
    if isinstance(examples, str | bytes) or not isinstance(examples, Iterable):
        raise TypeError(
            f"`examples` must be a list of train.Example, got {described(examples)}; {makers}."
        )
    for index, example in enumerate(examples):
        if not isinstance(example, Example):
            raise TypeError(
                f"`examples` must be train.Example, number {index} is {described(example)}; "
                f"{makers}."
            )
        yield example


def as_length(length: Any) -> int:
    """The length of rows: a token and its successor at least.

    **Raises:** `TypeError`, `ValueError`.
    """
    length = as_integer("length", length)
    if length < 2:
        raise ValueError(f"A batch needs rows of at least 2 tokens, got length={length}.")
    return length


def as_rows(rows: Any) -> int:
    """The number of rows of a batch.

    **Raises:** `TypeError`, `ValueError`.
    """
    rows = as_integer("rows", rows)
    if rows < 1:
        raise ValueError(f"A batch needs at least 1 row, got rows={rows}.")
    return rows


def split_long(examples: Iterable[Example], length: int) -> Iterator[Example]:
    """The examples, longer ones as chunks of at most `length` tokens.

    A chunk begins with the token that the one before it ends with, so that each token is the target
    of one chunk. Chunks without any target of a weight are left out. An example with images stays
    whole: a cut could go through one.

    **Arguments:**

    - `examples`: of any lengths.
    - `length`: the most tokens of a chunk, at least 2.

    **Yields:** examples, in their order.
    """
    length = as_length(length)
    for example in each_example(examples):
        if len(example.images):
            if np.any(example.weights[1:]):
                yield example
            continue
        for start in range(0, max(len(example.tokens) - 1, 0), length - 1):
            part = slice(start, start + length)
            chunk = Example(example.tokens[part], example.weights[part])
            if np.any(chunk.weights[1:]):
                yield chunk


def place_first_fit(filled: list[list[Example]], chunk: Example, length: int, rows: int) -> bool:
    """Adds a chunk to the first row with room for it; False, and no change, if there is none."""
    for row in filled:
        if sum(len(other.tokens) for other in row) + len(chunk.tokens) <= length:
            row.append(chunk)
            return True
    if len(filled) == rows:
        return False
    filled.append([chunk])
    return True


def collate(filled: list[list[Example]], length: int, rows: int) -> Batch:
    """The arrays of a batch; rows that are not filled are empty."""
    shape = (rows, length)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    positions, segments = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    for row, examples in enumerate(filled):
        if any(len(example.images) for example in examples):
            raise ValueError(
                "An example has images, which packed rows do not hold: give vision=, the "
                "config of the model's tower, for batches with them."
            )
        start = 0
        for segment, example in enumerate(examples):
            size = len(example.tokens)
            here = slice(start, start + size)
            tokens[row, here] = example.tokens
            targets[row, start : start + size - 1] = example.tokens[1:]
            weights[row, start : start + size - 1] = example.weights[1:]
            positions[row, here] = np.arange(size)
            segments[row, here] = segment
            start += size
    return Batch(*map(jnp.asarray, (tokens, targets, weights, positions, segments)))
