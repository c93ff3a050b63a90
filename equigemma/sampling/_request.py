"""The arguments of one generation: checked, and padded so that few programs serve all lengths."""

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import (
    as_float_dtype,
    as_id_tuple,
    as_ids,
    as_integer,
    bucketed,
    check_known,
)
from equigemma._typing import Array, ArrayLike, DTypeLike, Float, Int, Integer, Key
from equigemma.nn import (
    PADDING,
    Cache,
    Transformer,
    capacity,
    check_cache_matches,
    check_whole_images,
    init_cache,
)
from equigemma.sampling._on_host import on_host, split_like
from equigemma.sampling._sampler import AbstractSampler
from equigemma.sampling._state import CHUNK, GenerationState, prefill
from equigemma.sampling._trace_once import trace_once
from equigemma.sampling._transforms import LogitBias


MAX_NEW_TOKENS = 1 << 20
"""Most tokens of one call: several times the length of the texts that any of these models saw."""


Ids = Iterable[SupportsIndex] | Integer[ArrayLike, " ids"]
"""Token ids in a list, a set or an array."""


class GenerationRequest(eqx.Module):
    """Arguments of a compiled generation besides the model and the sampler."""

    tokens: Int[Array, "*B length"]  # prompts from the left; -1 after them
    cache: Cache | None
    stop_tokens: Int[Array, " stops"]
    key: Key[Array, "..."] | None
    soft_tokens: Float[Array, "*B I M D"] | None
    chunk: int = eqx.field(static=True)
    num_samples: int | None = eqx.field(static=True)
    top_logprobs: int | None = eqx.field(static=True)
    cache_dtype: jnp.dtype | None = eqx.field(static=True, default=None)


def validate_and_pad(
    model: Transformer,
    tokens: Integer[ArrayLike, "*B L"] | Sequence[Any],
    *,
    max_new_tokens: int,
    stop_tokens: Ids,
    cache: Cache | None,
    sampler: object,
    key: Array | None = None,
    soft_tokens: Float[Array, "*B I M D"] | None = None,
    num_samples: SupportsIndex | None = None,
    top_logprobs: SupportsIndex | None = None,
    cache_dtype: DTypeLike | None = None,
    caller: str = "sampling.generate",
) -> GenerationRequest:
    """Checks the arguments of `generate` and pads the prompts.

    **Raises:** `TypeError` or `ValueError`, see `generate`.
    """
    advice = "For vmap give it a batch axis; else use sampling.prefill and decode_step."
    known = {"model": model, "tokens": tokens, "key": key, "cache": cache}
    check_known(caller, advice, **known, soft_tokens=soft_tokens)
    vocab = model.config.vocab
    tokens = as_ids("tokens", tokens)
    rows = on_host(tokens)
    _check_tokens(rows, vocab)
    _check_images(rows, soft_tokens)
    _check_max_new_tokens(max_new_tokens)
    _check_biases(sampler, vocab)
    if cache is not None:
        check_cache_matches(cache, model.config, rows.shape[:-1])
        _check_capacity(model, rows, max_new_tokens, cache)
    if num_samples is not None:
        num_samples = as_integer("num_samples", num_samples, least=1)
    if top_logprobs is not None:
        top_logprobs = min(as_integer("top_logprobs", top_logprobs, least=0), vocab)
    longest = rows.shape[-1]
    total = bucketed(longest + max_new_tokens, _SMALLEST_TOTAL)
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, total - longest)]
    return GenerationRequest(
        tokens=split_like(tokens, np.pad(rows, padding, constant_values=-1).astype(np.int32)),
        cache=cache,
        stop_tokens=jnp.asarray(np.asarray(_checked_stop_tokens(stop_tokens, vocab), np.int32)),
        key=None if key is None else _as_keys(key, rows.shape[:-1]),
        soft_tokens=soft_tokens,
        chunk=_chunk_size(longest, soft_tokens),
        num_samples=num_samples,
        top_logprobs=top_logprobs,
        cache_dtype=_checked_cache_dtype(cache_dtype, cache),
    )


@jax.jit
def start(
    model: Transformer, request: GenerationRequest, sampler: AbstractSampler
) -> GenerationState:
    """The state of a generation after prefill and the first token."""
    return prefill(
        trace_once(model),
        request.tokens,
        request_cache(model, request),
        sampler=sampler,
        stop_tokens=request.stop_tokens,
        key=request.key,
        soft_tokens=request.soft_tokens,
        chunk=request.chunk,
        num_samples=request.num_samples,
        top_logprobs=request.top_logprobs,
    )


def request_cache(model: Transformer, request: GenerationRequest) -> Cache:
    """The cache of the request, or an empty one of sufficient capacity."""
    if request.cache is not None:
        return request.cache
    *batch, total = request.tokens.shape
    dtype = request.cache_dtype or model.dtype
    return init_cache(model.config, tuple(batch), capacity=total, dtype=dtype)


def new_tokens(rows: Array, prompt: Array, max_new_tokens: int) -> Int[Array, "*B new"]:
    """What rows hold after their prompts; the rows may have more axes than the prompts."""
    starts = (on_host(prompt) != PADDING).sum(-1)
    starts = starts.reshape(*starts.shape, *[1] * (rows.ndim - starts.ndim))
    places = starts + np.arange(max_new_tokens)
    return split_like(prompt, np.take_along_axis(on_host(rows), places, axis=-1))


_SMALLEST_CHUNK, _SMALLEST_TOTAL = 32, 256


def _chunk_size(longest: int, soft_tokens: Float[Array, "*B I M D"] | None) -> int:
    """Tokens per forward pass of prefill; an image lies within one."""
    size = min(CHUNK, bucketed(longest, _SMALLEST_CHUNK))
    if soft_tokens is None:
        return size
    return max(size, bucketed(soft_tokens.shape[-2], _SMALLEST_CHUNK))


def _check_images(rows: np.ndarray, soft_tokens: Float[Array, "*B I M D"] | None) -> None:
    if soft_tokens is not None:
        check_whole_images(rows, *soft_tokens.shape[-3:-1])
    elif rows.min() < PADDING:
        raise ValueError(
            f"`tokens` holds the id {rows.min()}, which stands for a part of an image, and there "
            "is none: pass soft_tokens=, what model.encode_images made of it, or encode with the "
            "tokenizer."
        )


def _check_max_new_tokens(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if max_new_tokens > MAX_NEW_TOKENS:
        raise ValueError(f"max_new_tokens must be at most {MAX_NEW_TOKENS}, got {max_new_tokens}.")


def _checked_cache_dtype(dtype: DTypeLike | None, cache: Cache | None) -> jnp.dtype | None:
    if dtype is None:
        return None
    dtype = as_float_dtype("cache_dtype", dtype, or_=[jnp.int8])
    if cache is not None:
        raise ValueError(
            f"cache_dtype={dtype} is for a new cache, and one is given; make that with "
            "init_cache(..., dtype=...)."
        )
    return dtype


def _checked_stop_tokens(stop_tokens: Ids, vocab: int) -> tuple[int, ...]:
    ids = as_id_tuple("stop_tokens", stop_tokens)
    if outside := [index for index in ids if not 0 <= index < vocab]:
        raise ValueError(
            f"`stop_tokens` holds the id {outside[0]}, and the vocabulary ends at {vocab - 1}; the "
            "tokenizer's own are in `tokenizer.special.stop`."
        )
    return ids


def _as_keys(key: Array, batch: tuple[int, ...]) -> Key[Array, "..."]:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), batch):
        one_each = f", or one for each row, of shape {batch}" if batch else ""
        raise ValueError(f"`key` must be a single key{one_each}; got keys of shape {key.shape}.")
    return key


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
        raise ValueError(
            f"Token {rows.max()} is not in the vocabulary, which ends at {vocab - 1}. Encode with "
            "the tokenizer of this model."
        )


def _check_capacity(
    model: Transformer, rows: np.ndarray, max_new_tokens: int, cache: Cache
) -> None:
    lengths = (rows != PADDING).sum(-1) + on_host(cache.length)
    needed, held = int(lengths.max()) + max_new_tokens - 1, capacity(model.config, cache)
    if needed > held:
        raise ValueError(
            f"The cache has a capacity of {held} tokens, but what it holds, the prompt and "
            f"max_new_tokens need {needed}. Make it with init_cache(..., capacity={needed})."
        )


def _check_biases(sampler: object, vocab: int) -> None:
    for part in jax.tree.leaves(sampler, is_leaf=lambda part: isinstance(part, LogitBias)):
        if isinstance(part, LogitBias) and (index := int(part.ids.max(initial=0))) >= vocab:
            raise ValueError(
                f"A bias is given for token {index}, which is not in the vocabulary: that ends at "
                f"{vocab - 1}."
            )
