"""The arguments of one generation: checked, and padded so that few programs serve all lengths."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._typing import Array, Float, Int, Key
from equigemma.nn import Cache, Transformer, capacity, init_cache
from equigemma.nn._vision import PADDING, check_whole
from equigemma.sampling._state import CHUNK
from equigemma.sampling._transforms import LogitBias


LONGEST = 1 << 20
"""Most tokens of one call: several times the length of the texts that any of these models saw."""


class Call(eqx.Module):
    """What a compiled generation takes beside the model and how to choose."""

    tokens: Int[Array, "*B T"]  # prompts from the left; -1 after them
    cache: Cache | None
    stop: Int[Array, " stops"]
    key: Key[Array, "..."] | None
    soft: Float[Array, "*B I M D"] | None
    chunk: int = eqx.field(static=True)
    samples: int | None = eqx.field(static=True)
    logprobs: int | None = eqx.field(static=True)
    cache_dtype: jnp.dtype | None = eqx.field(static=True, default=None)


def prepare(
    model: Transformer,
    tokens: Int[Array, "*B L"],
    *,
    max_new_tokens: int,
    stop: Sequence[int],
    cache: Cache | None,
    rule: object,
    key: Key[Array, "..."] | None = None,
    soft: Float[Array, "*B I M D"] | None = None,
    samples: int | None = None,
    logprobs: int | None = None,
    cache_dtype: jnp.dtype | type | None = None,
) -> Call:
    """Checks the arguments of `generate` and pads them; `rule` is its `choose`.

    **Raises:** `ValueError`, see `generate`.
    """
    rows = np.asarray(tokens)
    _check_tokens(rows, model.config.vocab)
    if soft is not None:
        check_whole(tokens, *soft.shape[-3:-1])
    elif rows.min() < PADDING:
        raise ValueError(
            f"Token {rows.min()} stands for a part of an image, and there is none: pass soft=, "
            "what model.see made of it."
        )
    for name, number, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("samples", samples, 1),
        ("logprobs", logprobs, 0),
    ):
        if number is not None and number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}.")
    if max_new_tokens > LONGEST:
        raise ValueError(f"max_new_tokens must be at most {LONGEST}, got {max_new_tokens}.")
    if cache is not None and cache_dtype is not None:
        raise ValueError(
            f"cache_dtype={jnp.dtype(cache_dtype)} is for a new cache, and one is given; make that "
            "with init_cache(..., dtype=...)."
        )
    if cache is not None:
        _check_room(model, rows, max_new_tokens, cache)
    _check_biases(rule, model.config.vocab)
    longest = rows.shape[-1]
    total = _bucket(longest + max_new_tokens, _SMALLEST_TOTAL)
    chunk = min(CHUNK, _bucket(longest, _SMALLEST_CHUNK))
    if soft is not None:
        chunk = max(chunk, _bucket(soft.shape[-2], _SMALLEST_CHUNK))
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, total - longest)]
    return Call(
        tokens=jnp.asarray(np.pad(rows, padding, constant_values=-1), jnp.int32),
        cache=cache,
        stop=jnp.asarray(stop, jnp.int32),
        key=key,
        soft=soft,
        chunk=chunk,
        samples=samples,
        logprobs=None if logprobs is None else min(logprobs, model.config.vocab),
        cache_dtype=None if cache_dtype is None else jnp.dtype(cache_dtype),
    )


def cache_of(model: Transformer, call: Call) -> Cache:
    """The cache that a call brings with it, or an empty one with room for all of it."""
    if call.cache is not None:
        return call.cache
    *batch, total = call.tokens.shape
    dtype = call.cache_dtype or model.dtype
    return init_cache(model.config, tuple(batch), capacity=total, dtype=dtype)


def new_tokens(rows: Array, prompt: Array, max_new_tokens: int) -> Int[Array, "*B new"]:
    """What rows hold after their prompts; the rows may have more axes than the prompts."""
    starts = (np.asarray(prompt) != PADDING).sum(-1)
    starts = starts.reshape(*starts.shape, *[1] * (rows.ndim - starts.ndim))
    places = starts + np.arange(max_new_tokens)
    return jnp.asarray(np.take_along_axis(np.asarray(rows), places, axis=-1))


_SMALLEST_CHUNK, _SMALLEST_TOTAL = 32, 256


def _bucket(length: int, smallest: int) -> int:
    """The next power of two, at least `smallest`."""
    return max(smallest, 1 << (length - 1).bit_length())


def _check_tokens(rows: np.ndarray, vocab: int) -> None:
    filled = rows != PADDING
    if not rows.size or not filled[..., 0].all():
        raise ValueError(
            "Every prompt needs at least one token, from the first place on; got an empty one. "
            "A text starts with the beginning-of-sequence token."
        )
    if (filled[..., 1:] & ~filled[..., :-1]).any():
        raise ValueError("Padding (-1) must come after the prompt of a row, not within it.")
    if rows.max() >= vocab:
        raise ValueError(f"Token {rows.max()} is not in the vocabulary, which ends at {vocab - 1}.")


def _check_room(model: Transformer, rows: np.ndarray, max_new_tokens: int, cache: Cache) -> None:
    lengths = (rows != PADDING).sum(-1) + np.asarray(cache.length)
    needed, room = int(lengths.max()) + max_new_tokens - 1, capacity(model.config, cache)
    if needed > room:
        raise ValueError(
            f"The cache has room for {room} tokens, but what it holds, the prompt and "
            f"max_new_tokens need {needed}. Make it with init_cache(..., capacity={needed})."
        )


def _check_biases(rule: object, vocab: int) -> None:
    for part in jax.tree.leaves(rule, is_leaf=lambda part: isinstance(part, LogitBias)):
        if isinstance(part, LogitBias) and (index := int(part.ids.max(initial=0))) >= vocab:
            raise ValueError(
                f"A bias is given for token {index}, which is not in the vocabulary: that ends at "
                f"{vocab - 1}."
            )
