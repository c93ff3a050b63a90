"""Beam search: the most probable texts, several of them kept going side by side."""

from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._arguments import as_integer, as_number
from equigemma._kernels import on_auto_axes
from equigemma._typing import Array, ArrayLike, Bool, Float, Int, Integer, typed
from equigemma.nn import PADDING, Cache, Transformer
from equigemma.sampling._failed import raise_failed
from equigemma.sampling._fork import select_rows, tile
from equigemma.sampling._request import (
    GenerationRequest,
    Ids,
    new_tokens,
    request_cache,
    validate_and_pad,
)
from equigemma.sampling._state import prefill_cache
from equigemma.sampling._trace_once import trace_once
from equigemma.sampling._transforms import Transform, as_module


class Beams(NamedTuple):
    """The best texts found, best first: new tokens, a stop token included, −1 after the end.

    A text's score is the sum of its log-probabilities over its number of tokens to the power of
    `length_penalty`. Where fewer texts are possible than beams, the rest have score −inf and no
    tokens.
    """

    tokens: Int[Array, "*B beams new"]
    scores: Float[Array, "*B beams"]


@typed
@on_auto_axes()
def beam_search(
    model: Transformer,
    tokens: Integer[ArrayLike, "*B L"] | Sequence[Any],
    *,
    num_beams: SupportsIndex,
    max_new_tokens: SupportsIndex,
    length_penalty: float | int = 1.0,
    transform: Transform | None = None,
    stop_tokens: Ids = (),
    cache: Cache | None = None,
) -> Beams:
    """Searches for the continuations of each row with the highest score.

    At each step all beams are continued by all tokens, and the best continuations that have not
    ended go on. Those among the best `num_beams` that have ended are candidates for the result. A
    row is finished once `num_beams` texts have ended and no beam has a better score than the worst
    of them as it stands. Rows do not depend on each other; the whole search is one compiled
    program.

    **Arguments:**

    - `model`: a causal `Transformer`.
    - `tokens`, `max_new_tokens`, `stop_tokens`, `cache`: as in `generate`.
    - `num_beams`: how many texts are followed, and returned, for each row.
    - `length_penalty`: 0 compares sums of log-probabilities, 1 means, above 1 favours long texts.
    - `transform`: of log-probabilities, before they are added up; sees prompt and text so far.

    **Returns:** texts and their scores, best first.

    **Raises:** as `generate` does; `ValueError` if `num_beams < 1`.

    **Source:** the rules, and which texts count as ended, are those of `transformers`
    (`generation/utils.py::_beam_search` with `early_stopping=False`).
    """
    num_beams = as_integer("num_beams", num_beams)
    if num_beams < 1:
        raise ValueError(f"A search needs at least one beam, got num_beams={num_beams}.")
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens)
    length_penalty = as_number("length_penalty", length_penalty)
    transform = as_module(transform)
    request = validate_and_pad(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        cache=cache,
        sampler=transform,
        num_samples=num_beams,
        caller="sampling.beam_search",
    )
    limits = _Limits(
        jnp.asarray(max_new_tokens, jnp.int32), jnp.asarray(length_penalty, jnp.float32)
    )
    search = _run(model, request, transform, limits)
    raise_failed(search.failed)
    found = jnp.isfinite(search.ended_scores)[..., None]
    texts = new_tokens(search.ended, request.tokens, max_new_tokens)
    return Beams(jnp.where(found, texts, -1), search.ended_scores)


class _Limits(eqx.Module):
    max_new_tokens: Int[Array, ""]
    length_penalty: Float[Array, ""]


class _Search(eqx.Module):
    """Beams under way and texts that have ended, both from the best to the worst."""

    tokens: Int[Array, "*B beams length"]  # prompt and what was generated; -1 where empty
    length: Int[Array, "*B"]  # tokens in each text of a row: all have as many
    last_token: Int[Array, "*B beams"]
    scores: Float[Array, "*B beams"]  # sums of log-probabilities
    ended: Int[Array, "*B beams length"]
    ended_scores: Float[Array, "*B beams"]  # with the length penalty; -inf: nothing there yet
    open: Bool[Array, "*B"]  # rows whose result may still become better
    failed: Bool[Array, "*B"]  # rows with a beam whose logits are not finite
    cache: Cache
    step: Int[Array, ""]


@jax.jit
def _run(
    model: Transformer, request: GenerationRequest, transform: Transform | None, limits: _Limits
) -> _Search:
    model = trace_once(model)

    def step(search: _Search) -> _Search:
        hidden, cache = model.trunk(
            search.last_token[..., None],
            positions=search.cache.length[..., None],
            cache=search.cache,
        )
        search = eqx.tree_at(lambda s: s.cache, search, cache)
        return _continue(model, search, hidden[..., 0, :], transform, request.stop_tokens, limits)

    return jax.lax.while_loop(
        lambda search: (search.step < limits.max_new_tokens) & search.open.any(),
        step,
        _start(model, request, transform, limits),
    )


def _start(
    model: Transformer, request: GenerationRequest, transform: Transform | None, limits: _Limits
) -> _Search:
    hidden, cache = prefill_cache(
        model, request.tokens, request_cache(model, request), request.chunk, request.soft_tokens
    )
    length = jnp.sum(request.tokens != PADDING, axis=-1, dtype=jnp.int32)
    beams = request.num_samples
    assert beams is not None
    tokens, hidden, cache = tile((request.tokens, hidden, cache), length.ndim, beams)
    nothing = jnp.full(tokens.shape[:-1], -jnp.inf, jnp.float32)
    search = _Search(
        tokens=tokens,
        length=length,
        last_token=tokens[..., 0],
        # All beams hold the same text: the first alone is continued.
        scores=nothing.at[..., 0].set(0),
        ended=tokens,
        ended_scores=nothing,
        open=jnp.ones(length.shape, bool),
        failed=jnp.zeros(length.shape, bool),
        cache=cache,
        step=jnp.zeros((), jnp.int32),
    )
    return _continue(model, search, hidden, transform, request.stop_tokens, limits)


def _continue(
    model: Transformer,
    search: _Search,
    hidden: Float[Array, "*B beams D"],
    transform: Transform | None,
    stop_tokens: Int[Array, " stops"],
    limits: _Limits,
) -> _Search:
    logits = model.unembed(hidden)
    log_probs = jax.nn.log_softmax(logits)
    if transform is not None:
        log_probs = transform(log_probs, search.tokens)
    running = jnp.isfinite(search.scores) & search.open[..., None]
    broken = ~jnp.isfinite(logits.max(axis=-1)) | jnp.isnan(log_probs.max(axis=-1))
    failed = search.failed | (running & broken).any(axis=-1)
    *batch, beams, vocab = log_probs.shape
    sums = (search.scores[..., None] + log_probs).reshape(*batch, beams * vocab)
    # Each beam ends in at most `stop_tokens.size` ways, so among these are `beams` that go on.
    count = min(max(2, 1 + stop_tokens.size) * beams, beams * vocab)
    sums, index = jax.lax.top_k(sums, count)
    origin, token = index // vocab, index % vocab

    step = search.step + 1
    worth = step.astype(jnp.float32) ** limits.length_penalty
    texts = select_rows(search.tokens, origin)
    slots = jnp.broadcast_to(jnp.arange(texts.shape[-1]), texts.shape)
    texts = jnp.where(slots == search.length[..., None, None], token[..., None], texts)

    ends = jnp.isin(token, stop_tokens) | (step >= limits.max_new_tokens)
    scores, going_on = jax.lax.top_k(jnp.where(ends, -jnp.inf, sums), beams)
    counts = ends & jnp.broadcast_to(jnp.arange(count) < beams, ends.shape) & search.open[..., None]
    ended_scores, ended = jax.lax.top_k(
        jnp.concatenate([search.ended_scores, jnp.where(counts, sums / worth, -jnp.inf)], axis=-1),
        beams,
    )
    return _Search(
        tokens=select_rows(texts, going_on),
        length=search.length + 1,
        last_token=select_rows(token, going_on),
        scores=scores,
        ended=select_rows(jnp.concatenate([search.ended, texts], axis=-2), ended),
        ended_scores=ended_scores,
        open=search.open & ~failed & (scores[..., 0] / worth > ended_scores[..., -1]),
        failed=failed,
        cache=select_rows(search.cache, select_rows(origin, going_on)),
        step=step,
    )
