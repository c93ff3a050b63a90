"""Learning from texts about images: one text to a row, its soft tokens between its words.

The rest of training stays as it is: a batch and a loss of it, for `make_step` and `fit`. Rows are
not packed, because the tokens of an image attend to each other, which no mask of segments says.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equigemma._typing import Array, Float32, Int
from equigemma.config import SigLIPConfig
from equigemma.nn import (
    PADDING,
    Transformer,
    indices_after_insertion,
    insert_image_tokens,
    preprocess_images,
)
from equigemma.train._batch import Example, ImageBatch
from equigemma.train._next_token import next_token_loss


def collate_images(
    examples: Sequence[Example],
    vision: SigLIPConfig,
    *,
    length: int,
    rows: int | None = None,
    max_images: int | None = None,
    read: Callable[[Any], np.ndarray] = np.asarray,
) -> ImageBatch:
    """The batch of some examples, each `vision.start` among the tokens of one being an image.

    The tokens of images are never trained on.

    **Arguments:**

    - `examples`: at least one, each a row.
    - `vision`: the config of the model's tower, `model.config.vision`.
    - `length`: of the rows, images included.
    - `rows`, `max_images`: rows, and images in each, to fill up to; by default there are as many as
      are needed.
    - `read`: what makes `uint8[height width 3]`, of any size, of an example's image.

    **Returns:** a batch whose images are preprocessed for the tower.

    **Raises:** `ValueError` if an example has another number of images than of tokens for them, or
    does not fit into a row: a cut could go through an image.
    """
    if not examples:
        raise ValueError("A batch needs at least one example, got none.")
    for example in examples:
        check_fits(example, vision, length)
    count = len(examples) if rows is None else rows
    each = max(len(example.images) for example in examples) if max_images is None else max_images
    given = np.full((count, length), PADDING, np.int32)
    wanted = np.zeros((count, length), np.float32)
    looks = np.zeros((count, each, vision.pixels, vision.pixels, 3), np.float32)
    for row, example in enumerate(examples):
        here = slice(0, len(example.tokens))
        given[row, here], wanted[row, here] = example.tokens, example.weights
        for index, image in enumerate(example.images):
            looks[row, index] = preprocess_images(jnp.asarray(read(image)), vision.pixels)
    ids, at = map(np.asarray, _insert(given, vision, each))
    weights = np.zeros(ids.shape, np.float32)
    np.put_along_axis(weights, at, np.where(given == vision.start, 0, wanted), axis=-1)
    # All rows have room for as many images as any has; none goes beyond `length`.
    ids, weights = ids[:, :length], weights[:, :length]
    is_there = ids != PADDING
    return ImageBatch(
        tokens=jnp.asarray(np.where(is_there, ids, 0)),
        targets=jnp.asarray(_next(np.maximum(ids, 0))),
        weights=jnp.asarray(_next(weights)),
        positions=jnp.asarray(np.where(is_there, np.arange(length, dtype=np.int32), -1)),
        pixels=jnp.asarray(looks),
    )


@partial(jax.jit, static_argnums=(1, 2))
def _insert(
    tokens: Int[Array, "B L"], vision: SigLIPConfig, images: int
) -> tuple[Int[Array, "B _"], Int[Array, "B L"]]:
    """Ids with soft tokens, and where each token is among them."""
    return insert_image_tokens(tokens, vision, images), indices_after_insertion(
        tokens, vision, images
    )


def _next(array: np.ndarray) -> np.ndarray:
    """Shifted left by one."""
    return np.pad(array[:, 1:], ((0, 0), (0, 1)))


def added_tokens(vision: SigLIPConfig) -> int:
    """Number of tokens that an image adds to that of its own."""
    return vision.num_soft_tokens + 3


def check_fits(example: Example, vision: SigLIPConfig, length: int | None = None) -> None:
    """Refuses an example that is no row of a batch with images, where `length` is given also one
    without room in it.

    **Arguments:**

    - `example`: with images, or without.
    - `vision`: the config of the model's tower, `model.config.vision`.
    - `length`: of the rows, images included; None: any.

    **Raises:** `ValueError`, see `collate_images`.
    """
    images = len(example.images)
    count = int((np.asarray(example.tokens) == vision.start).sum())
    if count != images:
        raise ValueError(
            f"An example has {images} image(s), and {count} token(s) {vision.start} "
            "that stand for one each."
        )
    size = len(example.tokens) + images * added_tokens(vision)
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

    **Arguments:**

    - `model`: a `Transformer` with a vision tower.
    - `batch`: as `collate_images` makes it.
    - `**options`: those of `next_token_loss`, but for `soft_tokens`.

    **Returns:** the sum in nats, and the sum of the weights.

    **Raises:** `ValueError` if the model has no vision tower.
    """
    if model.vision is None:
        raise ValueError("The batch has images, and the model reads text only: it has no tower.")
    return next_token_loss(model, batch, soft_tokens=model.vision(batch.pixels), **options)
