"""Images of a conversation: where they are among its ids, and what the model sees in them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from equigemma._typing import Array, Float
from equigemma.chat._messages import Message, User
from equigemma.images import Picture
from equigemma.nn import Transformer
from equigemma.text import encode_image


class Read(NamedTuple):
    """A conversation as a model reads it."""

    ids: list[int]
    """With soft tokens, as `nn.insert_image_tokens` numbers them."""
    marks: list[int | bytes]
    """By which it is told from another: ids, and of soft tokens what their image is."""
    pictures: tuple[Picture, ...]


def with_images(model: Transformer, ids: Sequence[int], messages: Sequence[Message]) -> Read:
    """The ids of a conversation with the soft tokens of its images.

    **Raises:** `ValueError` if the model reads text only, or the ids have no place for an image.
    """
    pictures = tuple(
        image for message in messages if isinstance(message, User) for image in message.images
    )
    if not pictures:
        return Read(list(ids), list(ids), ())
    if model.vision is None:
        raise ValueError(
            "Images were given, but this model reads text only: it has no vision tower. Leave them "
            "out, or load a checkpoint that has one."
        )
    config = model.vision.config
    places = sum(index == config.start for index in ids)
    if places != len(pictures):
        raise ValueError(
            f"The conversation has {len(pictures)} image(s), and the way it is written has places "
            f"for {places}: the format is not one for images, or the vocabulary not the model's."
        )
    read: list[int] = []
    marks: list[int | bytes] = []
    left = iter(enumerate(pictures))
    for index in ids:
        if index != config.start:
            read.append(index)
            marks.append(index)
            continue
        number, picture = next(left)
        first, size = -2 - number * config.num_soft_tokens, config.num_soft_tokens
        soft_tokens = range(first, first - size, -1)
        read += [config.newline, config.start, *soft_tokens, config.end, config.newline]
        block = [picture.digest] * size
        marks += [config.newline, config.start, *block, config.end, config.newline]
    return Read(read, marks, pictures)


def rest(
    model: Transformer, read: Read, start: int
) -> tuple[list[int], Float[Array, "I M D"] | None]:
    """The ids from `start` on, and the soft tokens that are among them.

    Only images that are still to be read are looked at; they are numbered anew.
    """
    ids = read.ids[start:]
    numbers = [-2 - index for index in ids if index < -1]
    if not numbers or model.vision is None:
        return ids, None
    size = model.vision.config.num_soft_tokens
    seen = min(numbers) // size
    soft_tokens = [encode_image(model.vision, picture) for picture in read.pictures[seen:]]
    return [index + seen * size if index < -1 else index for index in ids], jnp.stack(soft_tokens)
