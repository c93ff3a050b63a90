"""Learning from texts about images: one text to a row, its soft tokens between its words.

The rest of training stays as it is: a batch and a loss of it, for `make_step` and `fit`. Rows are
not packed, because the tokens of an image see each other, which no mask of segments says.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from equigemma._typing import Array, Float32
from equigemma.config import SigLIPConfig
from equigemma.nn import Transformer, insert, pixels, places
from equigemma.train._batch import Example, ImageBatch
from equigemma.train._step import next_token_loss


def with_images(
    examples: Sequence[Example],
    vision: SigLIPConfig,
    *,
    length: int,
    rows: int | None = None,
    most: int | None = None,
    read: Callable[[Any], np.ndarray] = np.asarray,
) -> ImageBatch:
    """The batch of some examples, each `vision.start` among the tokens of one being an image.

    What stands for an image is given, never learned.

    **Arguments:** `length`: of the rows, images included. `rows`, `most`: rows, and images in each,
    to fill up to; by default there are as many as are needed. `read`: what makes
    `uint8[height width 3]`, of any size, of an example's image.

    **Raises:** `ValueError` if an example has another number of images than of places for them, or
    does not fit into a row: a cut could go through an image.
    """
    if not examples:
        raise ValueError("A batch needs at least one example, got none.")
    for example in examples:
        check_fits(example, vision, length)
    count = len(examples) if rows is None else rows
    each = max(len(example.images) for example in examples) if most is None else most
    shape, size = (count, length), vision.pixels
    tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    looks = np.zeros((count, each, size, size, 3), np.float32)
    for row, example in enumerate(examples):
        given = np.asarray(example.tokens, np.int32)
        ids, learned = _inserted(given, np.asarray(example.weights, np.float32), vision)
        here = slice(0, len(ids))
        tokens[row, here], positions[row, here] = ids, np.arange(len(ids))
        targets[row, : len(ids) - 1], weights[row, : len(ids) - 1] = ids[1:], learned[1:]
        for index, image in enumerate(example.images):
            looks[row, index] = pixels(jnp.asarray(read(image)), size)
    targets = np.maximum(targets, 0)
    return ImageBatch(*map(jnp.asarray, (tokens, targets, weights, positions, looks)))


def check_fits(example: Example, vision: SigLIPConfig, length: int | None = None) -> None:
    """Refuses an example that is no row of a batch with images, where `length` is given also one
    without room in it.

    **Raises:** `ValueError`, see `with_images`.
    """
    images = len(example.images)
    count = int((np.asarray(example.tokens) == vision.start).sum())
    if count != images:
        raise ValueError(
            f"An example has {images} image(s), and places for {count}: each {vision.start} among "
            "its tokens is one."
        )
    size = len(example.tokens) + images * (vision.soft_tokens + 3)
    if length is not None and size > length:
        raise ValueError(
            f"An example has {size} tokens with its {images} image(s), and a row has {length}."
        )


def image_loss(
    model: Transformer, batch: ImageBatch, **options: Any
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sum of −log p(next token) over a batch, and the sum of the weights.

    Gradients reach the tower too, where it is trained; leave it out with `trainable=` of `init`.
    The options are those of `next_token_loss`.

    **Raises:** `ValueError` if the model has no vision tower.
    """
    if model.vision is None:
        raise ValueError("The batch has images, and the model reads text only: it has no tower.")
    return next_token_loss(model, batch, soft=model.vision(batch.pixels), **options)


def _inserted(
    tokens: np.ndarray, weights: np.ndarray, vision: SigLIPConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Ids with soft tokens, and the weight of each as a target."""
    is_text = tokens != vision.start
    count = int((~is_text).sum())
    ids = np.asarray(insert(jnp.asarray(tokens), vision, count))
    learned = np.zeros(len(ids), np.float32)
    learned[np.asarray(places(jnp.asarray(tokens), vision, count))[is_text]] = weights[is_text]
    return ids, learned
