"""Images among the tokens of a text: soft tokens, where they go, and how they are numbered there.

In a text that the model reads, id −2 − k is the soft token k of its row, counted through all of the
row's images, and −1 is padding. So a token says by itself which vector it is, which image it is
part of, and where in that image: a text can be cut anywhere but within an image.
"""

from math import isqrt

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from equigemma._typing import (
    Array,
    ArrayLike,
    Bool,
    Float,
    Float32,
    Int,
    PRNGKeyArray,
    UInt8,
    typed,
)
from equigemma.config import NormConfig, SigLIPConfig
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._norm import RMSNorm
from equigemma.nn._siglip import SigLIP
from equigemma.nn._summary import shallow_repr, summary


PADDING = -1
FIRST = -2
"""The id of soft token 0; those of the others are below it."""


@typed
def preprocess_images(
    images: UInt8[Array, "*B height width 3"], size: int
) -> Float32[Array, "*B {size} {size} 3"]:
    """Images as the tower wants them: square, `size` pixels on each side, colours from −1 to 1.

    **Arguments:**

    - `images`: of one size, of any aspect ratio, which is not kept.
    - `size`: pixels on each side, `config.pixels`.

    **Returns:** what `Vision` takes.

    **Source:** gemma `gm/vision/_preprocess.py`.
    """
    shape = (*images.shape[:-3], size, size, 3)
    resized = jax.image.resize(images.astype(jnp.float32), shape, "bilinear", antialias=True)
    return jnp.clip((resized - 127.5) / 127.5, -1, 1)


class Vision(eqx.Module):
    """Pixels to soft tokens: the tower, averages of neighbouring patches, and a projection."""

    __pdoc__ = summary
    __repr__ = shallow_repr

    tower: SigLIP
    norm: RMSNorm
    projection: AbstractEinsum

    def __init__(self, width: int, config: SigLIPConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        tower_key, projection_key = jax.random.split(key)
        self.tower = SigLIP(config, key=tower_key, dtype=dtype)
        self.norm = RMSNorm(config.width, NormConfig(epsilon=config.epsilon), dtype=dtype)
        self.projection = Einsum(
            "...T,TD->...D", (config.width, width), key=projection_key, dtype=dtype
        )

    @property
    def config(self) -> SigLIPConfig:
        """That of the tower."""
        return self.tower.config

    @typed
    def __call__(self, pixels: Float32[Array, "*B height width 3"]) -> Float32[Array, "*B M D"]:
        """The soft tokens of each image.

        **Arguments:** `pixels`: what `preprocess_images` gives.

        **Returns:** M soft tokens for each image, `config.num_soft_tokens`.
        """
        with jax.named_scope("vision"):
            return self.projection(self.norm(self._averaged(self.tower(pixels))))

    def _averaged(self, x: Float32[Array, "*B L T"]) -> Float32[Array, "*B M T"]:
        side, pooled = self.config.side, isqrt(self.config.num_soft_tokens)
        window = side // pooled
        grid = x.reshape(*x.shape[:-2], pooled, window, pooled, window, x.shape[-1])
        return grid.mean(axis=(-4, -2)).reshape(*x.shape[:-2], pooled**2, x.shape[-1])


@typed
def insert_image_tokens(
    tokens: Int[Array, "*B L"], config: SigLIPConfig, images: int, padding: int = PADDING
) -> Int[Array, "*B _"]:
    """Each `config.start` becomes an image: newline, start, soft tokens, end, newline.

    All rows get longer by `images` images; where a row has fewer, `padding` follows. Further ones
    than that stay as they are. Line ends beside an image stay tokens of their own, as in DeepMind's
    package, which says that the models were trained so. The processor of Gemma 3 in `transformers`
    makes one token of them and of the newline of the image: there `"\\n<start_of_image>"` gives
    other ids, and so do two images side by side.

    **Arguments:**

    - `tokens`: ids, −1 for padding.
    - `config`: that of the vision tower, `model.config.vision`.
    - `images`: how many each row has at most.
    - `padding`: what follows a row with fewer.

    **Returns:** `int32`, L + `images` · (soft tokens + 3) long; soft tokens of images are negative
    numbers, see `is_image_token`.

    **Source:** gemma `gm/vision/_token_utils.py::add_extra_tokens_for_images`.
    """
    size = config.num_soft_tokens
    length = tokens.shape[-1] + images * (size + 3)

    def one_row(tokens: Int[Array, " L"], places: Int[Array, " L"]):
        here = jnp.arange(length)
        source = jnp.searchsorted(places, here, side="right") - 1
        step = here - places[source]
        is_image = _is_image(tokens, config, images)
        first = FIRST - (jnp.cumsum(is_image) - 1) * size
        in_image = jnp.select(
            [(step == 0) | (step == size + 3), step == 1, step == size + 2],
            [config.newline, config.start, config.end],
            first[source] - (step - 2),
        )
        text = jnp.where(step == 0, tokens[source], padding)
        return jnp.where(is_image[source] & (step < size + 4), in_image, text)

    flat = tokens.reshape(-1, tokens.shape[-1])
    inserted = jax.vmap(one_row)(flat, indices_after_insertion(flat, config, images))
    return inserted.reshape(*tokens.shape[:-1], length).astype(jnp.int32)


@typed
def indices_after_insertion(
    tokens: Int[Array, "*B L"], config: SigLIPConfig, images: int
) -> Int[Array, "*B L"]:
    """Where each token is after `insert_image_tokens`; of an image, where its first newline is.

    **Arguments:** `tokens`, `config`, `images`: those of `insert_image_tokens`.

    **Returns:** indices into the last axis of what `insert_image_tokens` returns.
    """
    is_image = _is_image(tokens, config, images).astype(jnp.int32)
    before = jnp.cumsum(is_image, axis=-1) - is_image
    steps = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
    return (steps + before * (config.num_soft_tokens + 3)).astype(jnp.int32)


def _is_image(tokens: Array, config: SigLIPConfig, images: int) -> Array:
    is_start = tokens == config.start
    return is_start & (jnp.cumsum(is_start, axis=-1) <= images)


@typed
def is_image_token(tokens: Int[Array, "*B L"]) -> Bool[Array, "*B L"]:
    """True where a token is part of an image.

    **Arguments:** `tokens`: what `insert_image_tokens` returns.

    **Returns:** True for soft tokens; the start and end of an image are ordinary tokens.
    """
    return tokens <= FIRST


@typed
def merge_embeddings(
    x: Float[Array, "*B L D"], tokens: Int[Array, "*B L"], soft_tokens: Float[Array, "*B I M D"]
) -> Float[Array, "*B L D"]:
    """`x` with the vectors of soft tokens in their places; NaN for one that there is not.

    **Arguments:**

    - `x`: embeddings of all tokens.
    - `tokens`: what `insert_image_tokens` returns.
    - `soft_tokens`: I images of M soft tokens for each row.

    **Returns:** embeddings, in the dtype of `x`.
    """
    vectors = soft_tokens.reshape(*soft_tokens.shape[:-3], -1, soft_tokens.shape[-1])
    number = FIRST - tokens
    index = jnp.clip(number, 0, vectors.shape[-2] - 1)
    chosen = jnp.take_along_axis(vectors, index[..., None], axis=-2).astype(x.dtype)
    chosen = jnp.where((number == index)[..., None], chosen, jnp.asarray(jnp.nan, x.dtype))
    return jnp.where(is_image_token(tokens)[..., None], chosen, x)


@typed
def block_end(
    tokens: Int[Array, "*B L"], positions: Int[Array, "*B L"], size: int
) -> Int[Array, "*B L"]:
    """The position where the image ends that a token is part of; of text, its own position.

    **Arguments:** `size`: soft tokens of one image.
    """
    return jnp.where(
        is_image_token(tokens), positions + size - 1 - (FIRST - tokens) % size, positions
    )


def check_whole_images(tokens: Int[ArrayLike, "*B L"], images: int, size: int) -> None:
    """Refuses soft tokens that are not those of whole images, one after the other.

    **Arguments:**

    - `tokens`: what `insert_image_tokens` returns, or a part of it.
    - `images`: how many each row has.
    - `size`: soft tokens of an image.

    **Raises:** `ValueError`. Under `jit` tokens are unknown, so there nothing is noticed.
    """
    if isinstance(tokens, Tracer):
        return
    ids = np.asarray(tokens)
    number = FIRST - ids
    if number.max(initial=-1) >= images * size:
        raise ValueError(
            f"The tokens name soft token {number.max()}, and {images} image(s) have {size} each."
        )
    padded = np.pad(number, [(0, 0)] * (ids.ndim - 1) + [(1, 1)], constant_values=-1)
    goes_on = (padded[..., :-1] >= 0) & (padded[..., :-1] % size != size - 1)
    went_on = (padded[..., 1:] >= 0) & (padded[..., 1:] % size != 0)
    follows = padded[..., 1:] == padded[..., :-1] + 1
    if ((goes_on | went_on) & ~follows).any():
        raise ValueError(
            "An image must be read at once, because its tokens attend to each other; this call got "
            f"a part of one. Cut the text elsewhere than within the {size} soft tokens of an image."
        )
