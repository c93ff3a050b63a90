"""The inputs of one call of a model: checked, and completed by what follows from them.

Outside `jit` what cannot be computed is an error. Under `jit` values are unknown: there the rows
concerned are named, and the model gives them NaN.
"""

import sys
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from equigemma._arguments import as_ids, described
from equigemma._typing import Array, ArrayLike, Bool, Float, Int, Integer
from equigemma.config import ModelConfig
from equigemma.nn._attention import SequenceInfo
from equigemma.nn._cache import length_after
from equigemma.nn._model_cache import (
    Cache,
    capacity,
    check_cache_matches,
    check_capacity,
    check_causal,
    check_continues,
    continues,
    masked_by_position,
)
from equigemma.nn._vision import PADDING, block_end, check_whole_images


IdsLike = Integer[ArrayLike, "..."] | Sequence[Any]


class Inputs(eqx.Module):
    """Tokens, and what all layers share about them.

    `failed` marks rows beyond the capacity of the cache, or that do not continue it; None where
    there is no such row.
    """

    tokens: Int[Array, "*B L"]
    soft_tokens: Float[Array, "*B I M D"] | None
    sequence: SequenceInfo
    cache: Cache | None
    failed: Bool[Array, "*B"] | None


def complete(
    config: ModelConfig,
    tokens: IdsLike,
    *,
    soft_tokens: Array | None,
    positions: IdsLike | None,
    mask: Bool[ArrayLike, "..."] | None,
    segments: IdsLike | None,
    cache: Cache | None,
) -> Inputs:
    """The arguments of `Transformer.trunk`, checked and completed.

    **Raises:** `TypeError` or `ValueError`, see there.
    """
    tokens = as_ids("tokens", tokens)
    _check_tokens(tokens)
    length = jnp.zeros(tokens.shape[:-1], jnp.int32)
    if cache is not None:
        check_causal(config)
        check_cache_matches(cache, config, tokens.shape[:-1])
        if segments is not None:
            raise ValueError("A cache continues one text in each row: leave out segments.")
        length = cache.length
    contiguous = positions is None or segments is not None
    given = positions is not None
    if segments is not None:
        segments = _of_tokens("segments", as_ids("segments", segments), tokens)
    if positions is not None:
        positions = _of_tokens("positions", as_ids("positions", positions), tokens)
    else:
        positions = length[..., None] + _steps(tokens)
        if soft_tokens is not None:
            positions = jnp.where(tokens == PADDING, PADDING, positions)
    _check_ids(tokens, positions, config.vocab, soft_tokens)
    ends = None
    if soft_tokens is not None:
        _check_soft(soft_tokens, tokens, config.width)
        ends = block_end(tokens, positions, soft_tokens.shape[-2])
    if mask is not None:
        mask = _checked_mask(mask, tokens, config, cache)
    failed = None if cache is None else _failed(config, cache, positions, given, mask)
    # A token of padding is any token: no other attends to it.
    tokens = jnp.where((tokens == PADDING) & (positions == PADDING), 0, tokens)
    sequence = SequenceInfo(positions, length, mask, ends, segments, contiguous)
    return Inputs(tokens, soft_tokens, sequence, cache, failed)


def as_kept(keep: IdsLike, tokens: Int[Array, "*B L"]) -> Int[Array, "*B R"]:
    """`keep` as indices of tokens.

    **Raises:** `ValueError` where they are not of these tokens.
    """
    keep = as_ids("keep", keep)
    if keep.ndim != tokens.ndim or keep.shape[:-1] != tokens.shape[:-1]:
        raise ValueError(
            f"`keep` must have the batch of `tokens`, {tokens.shape[:-1]}, then the tokens to "
            f"keep of each row; got {described(keep)}."
        )
    if not isinstance(keep, Tracer):
        known, length = np.asarray(keep), tokens.shape[-1]
        if ((known < 0) | (known >= length)).any():
            raise ValueError(
                f"`keep` must hold indices of {length} tokens, 0 to {length - 1}; got "
                f"{known.tolist()}."
            )
    return keep


def _steps(tokens: Int[Array, "*B L"]) -> Int[Array, "*B L"]:
    return jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)


def _check_tokens(tokens: Array) -> None:
    if not tokens.ndim:
        raise ValueError(
            "`tokens` must have an axis of tokens, got a single id. For a text of one token pass "
            "[id]."
        )
    if not tokens.size:
        raise ValueError(
            f"`tokens` is empty, its shape is {tokens.shape}. A text has at least one token: "
            "`tokenizer.encode` begins it with the beginning-of-sequence token."
        )


def _check_soft(soft_tokens: Array, tokens: Array, width: int) -> None:
    if soft_tokens.shape[:-3] != tokens.shape[:-1] or soft_tokens.shape[-1] != width:
        raise ValueError(
            f"`soft_tokens` must have the batch of `tokens`, {tokens.shape[:-1]}, then images, "
            f"soft tokens and the model's width, {width}; got {described(soft_tokens)}."
        )


def _of_tokens(name: str, array: Array, tokens: Array) -> Array:
    if array.shape != tokens.shape:
        raise ValueError(
            f"`{name}` must have one entry for each token, {tokens.shape}; got {array.shape}."
        )
    return array


def _check_ids(tokens: Array, positions: Array, vocab: int, soft_tokens: Array | None) -> None:
    """Refuses ids that no vector belongs to, where they are known."""
    if soft_tokens is not None:
        check_whole_images(tokens, *soft_tokens.shape[-3:-1])
    if isinstance(tokens, Tracer):
        return
    ids = np.asarray(tokens)
    places = PADDING if isinstance(positions, Tracer) else np.asarray(positions)
    known = (ids >= 0) & (ids < vocab) | (ids == PADDING) & (places == PADDING)
    if soft_tokens is not None:
        known |= ids < PADDING
    if not known.all():
        raise ValueError(
            f"`tokens` holds the id {ids[~known][0]}, and the vocabulary ends at {vocab - 1}. "
            "Encode with the tokenizer of this model; padding is -1 where `positions` are -1 too."
        )


def _checked_mask(
    mask: Any, tokens: Array, config: ModelConfig, cache: Cache | None
) -> Bool[Array, "*B L S"]:
    """`mask` as an array of the right size.

    **Raises:** `TypeError` or `ValueError`.
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"`mask` must be of booleans, True: attends; got {described(mask)}.")
    columns, number = "one for each token", tokens.shape[-1]
    if cache is not None and masked_by_position(cache):
        columns, number = (
            "one for each position in the capacity of `cache`",
            _columns(config, cache),
        )
    elif cache is not None:
        return mask
    expected = (*tokens.shape, mask.shape[-1] if number is None else number)
    if mask.shape != expected:
        raise ValueError(
            f"`mask` must have the shape {expected}: a row for each token, and columns, {columns}; "
            f"got {mask.shape}."
        )
    return mask


def _columns(config: ModelConfig, cache: Cache) -> int | None:
    """The number of positions of a mask; None where no layer bounds them."""
    room = capacity(config, cache)
    return None if room == sys.maxsize else room


def _failed(
    config: ModelConfig,
    cache: Cache,
    positions: Int[Array, "*B L"],
    given: bool,
    mask: Bool[Array, "*B L S"] | None,
) -> Bool[Array, "*B"] | None:
    """Rows that the cache cannot take; None where it is known that there are none.

    **Raises:** `ValueError` where it is known that there are.
    """
    if not masked_by_position(cache):
        return None
    check_capacity(cache, config, positions)
    total, room = length_after(cache.length, positions), capacity(config, cache)
    if given:
        check_continues(cache, positions)
    if mask is not None and not isinstance(total, Tracer) and total.max() > mask.shape[-1]:
        raise ValueError(
            f"`mask` has columns for {mask.shape[-1]} positions, and with these tokens there are "
            f"{int(total.max())}: pass one for each position, those in `cache` included."
        )
    if not isinstance(total, Tracer):
        return None
    failed = ~continues(cache, positions) if given else None
    bound = room if mask is None else min(room, mask.shape[-1])
    if bound == sys.maxsize:
        return failed
    return total > bound if failed is None else failed | (total > bound)
