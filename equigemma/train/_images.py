"""Learning from texts about images: one text to a row, its soft tokens between its words.

The rest of training stays as it is: a batch and a loss of it, for `make_step` and `fit`. Rows are
not packed, because the tokens of an image see each other, which no mask of segments says.
"""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from equigemma._typing import Array, Float32, Int
from equigemma.config import SigLIPConfig
from equigemma.nn import Embedding, Transformer, insert, pixels, places
from equigemma.train._batch import Example
from equigemma.train._checkpointed import Policy, checkpointed
from equigemma.train._cross_entropy import cross_entropy


class ImageBatch(eqx.Module):
    """Rows of equal length with one text each. Id −2 − k is soft token k of the row."""

    tokens: Int[Array, "*B L"]  # as `nn.insert` gives them
    targets: Int[Array, "*B L"]  # the token that should follow
    weights: Float32[Array, "*B L"]  # of each target's loss; 0: not learned from
    positions: Int[Array, "*B L"]  # -1 after the end of the text
    pixels: Float32[Array, "*B I size size 3"]  # as `nn.pixels` gives them


def with_images(
    examples: Sequence[Example],
    images: Sequence[Sequence[np.ndarray]],
    vision: SigLIPConfig,
    length: int,
) -> ImageBatch:
    """The batch of some examples, each `vision.start` among the tokens of one being an image.

    What stands for an image is given, never learned.

    **Arguments:** `images`: of each example, in their order, `uint8[height width 3]` of any size.
    `length`: of the rows, images included.

    **Raises:** `ValueError` if an example has another number of images than of places for them, or
    does not fit into a row: a cut could go through an image.
    """
    if len(images) != len(examples) or not examples:
        raise ValueError(f"There are {len(examples)} examples, and images for {len(images)}.")
    shape, most = (len(examples), length), max(map(len, images))
    tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    size = vision.pixels
    looks = np.zeros((len(examples), most, size, size, 3), np.float32)
    for row, (example, shown) in enumerate(zip(examples, images, strict=True)):
        given = np.asarray(example.tokens, np.int32)
        if (count := int((given == vision.start).sum())) != len(shown):
            raise ValueError(
                f"Example {row} has {len(shown)} image(s), and places for {count}: each "
                f"{vision.start} among its tokens is one."
            )
        ids, learned = _inserted(given, np.asarray(example.weights, np.float32), vision)
        if len(ids) > length:
            raise ValueError(
                f"Example {row} has {len(ids)} tokens with its images, and a row has {length}."
            )
        here = slice(0, len(ids))
        tokens[row, here], positions[row, here] = ids, np.arange(len(ids))
        targets[row, : len(ids) - 1], weights[row, : len(ids) - 1] = ids[1:], learned[1:]
        for index, image in enumerate(shown):
            looks[row, index] = pixels(jnp.asarray(image), size)
    targets = np.maximum(targets, 0)
    return ImageBatch(*map(jnp.asarray, (tokens, targets, weights, positions, looks)))


def image_loss(
    model: Transformer,
    batch: ImageBatch,
    *,
    checkpoint: Policy | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 128,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sum of −log p(next token) over a batch, and the sum of the weights.

    Gradients reach the tower too, where it is trained; leave it out with `trainable=` of `init`.
    The options are those of `next_token_loss`.

    **Raises:** `ValueError` if the model has no vision tower.
    """
    if model.vision is None:
        raise ValueError("The batch has images, and the model reads text only: it has no tower.")
    soft = model.vision(batch.pixels)
    body = model if checkpoint is None else checkpointed(model, policy=checkpoint)
    hidden, _ = body.trunk(batch.tokens, soft=soft, positions=batch.positions)
    total = cross_entropy(
        hidden,
        # What is no plain table cannot learn.
        model.embedding.table if isinstance(model.embedding, Embedding) else model.embedding,
        batch.targets,
        batch.weights,
        softcap=model.config.final_softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk=chunk,
    )
    return total, batch.weights.sum()


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
