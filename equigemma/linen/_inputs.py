"""Checks and defaults of the inputs of a call.

Left-out positions and masks follow from the tokens: id 0 is padding, nothing else is.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equigemma._typing import Array, Bool, Int, typed
from equigemma.config import ModelConfig
from equigemma.linen._shapes import Sizes
from equigemma.nn import is_image_token
from equigemma.nn._vision import FIRST


PADDING = 0


def refuse_media(images: Any, audio: Any) -> None:
    """Refuses audio, and images that were cut to patches for the encoder of Gemma 4.

    **Raises:** `ValueError`.
    """
    if audio is not None:
        raise ValueError(
            "`audio` is not supported: models of equigemma.linen read text, and those of Gemma 3 "
            "and 3n images. Leave it out, or pass None."
        )
    if hasattr(images, "patches"):
        raise ValueError(
            "`images` are patches for the vision encoder of Gemma 4, which models of "
            "equigemma.linen do not have yet: they read its text only. Leave them out, or use "
            "DeepMind's model for images."
        )


def require_arrays(**arguments: Any) -> None:
    """Refuses what JAX would refuse in words about its own workings.

    **Raises:** `TypeError` that names the argument.
    """
    for name, value in arguments.items():
        if not isinstance(value, jax.Array | np.ndarray | None):
            raise TypeError(
                f"`{name}` must be an array, got a {type(value).__name__}; jax.numpy.asarray "
                "makes one of numbers."
            )


def check_call(
    config: ModelConfig,
    tokens: Any,
    images: Any,
    cache: Any,
    positions: Any,
    attention_mask: Any,
) -> None:
    """Refuses inputs that do not fit each other or the model, naming the first misfit.

    **Raises:** `TypeError` or `ValueError`.
    """
    sizes, length = Sizes(), "L"
    sizes.expect("tokens", tokens, "int", "*B L")
    if images is not None:
        per_row = getattr(images, "ndim", 0) == tokens.ndim + 2
        axes = "*B height width C" if per_row else "*B I height width C"
        sizes = sizes.given("every image", C=3)
        sizes.expect("images", images, "uint8", axes)
        if config.vision is None:
            raise ValueError(
                "`images` were given, but this model does not have vision encoder parameters: it "
                "reads text only. Leave them out, or use a model of Gemma 3 or 3n with a vision "
                "tower, and parameters that have it; that of Gemma 4 is not here yet."
            )
        length = "L_with_images"
        extra = (1 if per_row else sizes["I"]) * (config.vision.num_soft_tokens + 3)
        sizes = sizes.given("`tokens` with images in it", L_with_images=tokens.shape[-1] + extra)
    if positions is not None:
        sizes.expect("positions", positions, "int", f"*B {length}")
    if cache is not None:
        _check_cache(config, cache, sizes)
        _check_room(sizes[length], sizes["S"], attention_mask is not None)
    if attention_mask is not None:
        # Without a cache the keys are the tokens themselves.
        keys = length if cache is None else "S"
        sizes.expect("attention_mask", attention_mask, "bool", f"*B {length} {keys}")


def _check_room(tokens: int, slots: int, masked: bool) -> None:
    if tokens > slots:
        raise ValueError(
            f"`tokens` has L = {tokens}, but `cache` has room for S = {slots}. Make a longer cache "
            "with init_cache(cache_length=...), or pass fewer tokens at a time."
        )
    if not masked and tokens != slots:
        raise ValueError(
            f"`attention_mask` is needed, because `cache` has S = {slots} slots and `tokens` has "
            f"L = {tokens}: pass bool[*B L S], True for each slot that a token attends to."
        )


def _check_cache(config: ModelConfig, cache: Any, sizes: Sizes) -> None:
    names = [f"layer_{index}" for index in range(len(config.layers))]
    if not isinstance(cache, Mapping):
        got = "an array" if isinstance(cache, jax.Array) else f"a {type(cache).__name__}"
        raise TypeError(f"`cache` must be a dict of layers, as init_cache makes it, got {got}.")
    if set(cache) != set(names):
        raise ValueError(
            f"`cache` is of another model: it has {len(cache)} layers, {', '.join(sorted(cache))}; "
            f"this model has {len(names)}, layer_0 to {names[-1]}."
        )
    for index, name in enumerate(names):
        layer, head_dim = cache[name], config.layers[index].attention.head_dim
        if not isinstance(layer, Mapping) or set(layer) != {"k", "v", "positions", "end_index"}:
            got = sorted(layer) if isinstance(layer, Mapping) else type(layer).__name__
            raise ValueError(
                f"`cache['{name}']` must be a dict of end_index, k, positions and v, got {got}."
            )
        sizes.expect(f"cache['{name}']['positions']", layer["positions"], "int", "*B S")
        sizes.expect(f"cache['{name}']['end_index']", layer["end_index"], "int", "*B")
        heads = sizes.given("this model", K=config.kv_heads(index), H=head_dim)
        for part in ("k", "v"):
            heads.expect(f"cache['{name}']['{part}']", layer[part], "float", "*B S K H")


@typed
def default_positions(tokens: Int[Array, "*B L"]) -> Int[Array, "*B L"]:
    """Real tokens counted from 0; padding repeats the position of the last real token before it."""
    return jnp.maximum(jnp.cumsum(tokens != PADDING, axis=-1, dtype=jnp.int32) - 1, 0)


@typed
def default_mask(tokens: Int[Array, "*B L"], per_image: int | None = None) -> Bool[Array, "*B L L"]:
    """A token attends to every real token that is not after it, and to all of its own image.

    **Arguments:** `per_image`: soft tokens of an image; None if there are none among the tokens.
    """
    length = tokens.shape[-1]
    before = jnp.tril(jnp.ones((length, length), jnp.bool_))
    mask = (tokens != PADDING)[..., None, :] & jnp.broadcast_to(
        before, (*tokens.shape[:-1], length, length)
    )
    if per_image is None:
        return mask
    image = jnp.where(is_image_token(tokens), (FIRST - tokens) // per_image, -1)
    same = image[..., :, None] == image[..., None, :]
    return mask | same & (image >= 0)[..., None, :]


@typed
def last_token(tokens: Int[Array, "*B L"]) -> Int[Array, "*B"]:
    """Where the last real token is, in rows padded on the right; −1, the end, if none is real."""
    return jnp.sum(tokens != PADDING, axis=-1, dtype=jnp.int32) - 1


def merge_batch(array: Array, batch_rank: int) -> Array:
    """Leading `batch_rank` axes as one."""
    return array.reshape(math.prod(array.shape[:batch_rank]), *array.shape[batch_rank:])
