"""Generation of token ids: whole answers in one compiled program, or token by token as they come.

Lengths are rounded up to buckets, so that prompts of any length share a handful of programs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._arguments import as_integer
from equigemma._kernels import on_auto_axes, while_loop
from equigemma._typing import (
    Array,
    ArrayLike,
    Bool,
    DTypeLike,
    Float,
    Int,
    Integer,
    Key,
    UInt32,
    typed,
)
from equigemma.nn import Cache, Transformer
from equigemma.sampling._compile import compile_once
from equigemma.sampling._failed import raise_failed
from equigemma.sampling._logprobs import Logprobs
from equigemma.sampling._request import (
    GenerationRequest,
    Ids,
    new_tokens,
    start,
    validate_and_pad,
)
from equigemma.sampling._sampler import AbstractSampler, Greedy
from equigemma.sampling._state import GenerationState, decode_step
from equigemma.sampling._stream import TokenStream
from equigemma.sampling._trace_once import trace_once


class Generated(NamedTuple):
    """New tokens of each row, a stop token included; −1 after the end. And what the model saw.

    With `num_samples=n` the batch `*B` of everything here ends with an axis of n.
    """

    tokens: Int[Array, "*B new"]
    cache: Cache
    logprobs: Logprobs | None = None


@typed
@on_auto_axes()
def generate(
    model: Transformer,
    tokens: Integer[ArrayLike, "*B L"] | Sequence[Any],
    *,
    max_new_tokens: SupportsIndex,
    sampler: AbstractSampler = Greedy(),
    stop_tokens: Ids = (),
    key: Key[Array, "..."] | UInt32[Array, "... 2"] | None = None,
    cache: Cache | None = None,
    soft_tokens: Float[Array, "*B I M D"] | None = None,
    num_samples: SupportsIndex | None = None,
    top_logprobs: SupportsIndex | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Generated:
    """Autoregressive decoding: continues each row of `tokens` until a stop token or a limit.

    The whole generation is one compiled program. Rows of different length are padded at the end
    with −1. Call it outside `jit`; inside, use `prefill` and `decode_step`.

    A row gives what it gives alone, up to rounding: a product of several rows adds up in another
    order than that of one. With Gemma 3 270M in float32, log-probabilities then differ by 2e-5. In
    bfloat16 it is 0.1, so that a text parts from that of its prompt alone where two tokens are
    nearly as likely as each other, within 48 tokens every second one did. A call for each prompt
    depends on no batch.

    **Arguments:**

    - `model`: a causal `Transformer`, in any form: prepared, quantized, with adapters.
    - `tokens`: prompts, at least one token per row; integers of any type, also lists.
    - `max_new_tokens`: the most tokens that are generated for a row.
    - `sampler`: `Greedy()`, or `Sample(...)`, which needs a `key`; `make_sampler(...)` makes either
      from the usual numbers. Penalties see the tokens of this call, not those in `cache`.
    - `stop_tokens`: ids that end a row, in a list, a set or an array.
    - `key`: one key, used alike for every row, or one per row. A row's text depends on its prompt,
      its key and the shape of the batch, not on what its neighbours are.
    - `cache`: that of an earlier call, with enough capacity left. It is not changed.
    - `soft_tokens`: what `model.encode_images` made of the images of each row. Their places among
      the tokens are those that `nn.insert_image_tokens` gives them.
    - `num_samples`: so many answers to each prompt, which is prefilled once: the result has a new
      axis after those of the batch. Answer i is that of a call with `jax.random.fold_in(key, i)`.
    - `top_logprobs`: also return the log-probability of each new token and of so many of the most
      probable ones; 0 is the new token alone. They are the model's own, before any transform.
    - `cache_dtype`: of a new cache, by default the model's. int8 takes half of the memory of
      bfloat16, and rounds keys and values.

    **Returns:** the new tokens of each row, −1 after its end; the KV cache, in which the last token
    is not yet; and log-probabilities, if asked for.

    **Raises:** `ValueError` for an empty prompt, a token or a biased id outside the vocabulary, a
    number of tokens, samples or log-probabilities that makes no sense, or a cache without room;
    `NonFiniteLogitsError` for rows in which no token can be chosen.
    """
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens)
    request = validate_and_pad(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        cache=cache,
        sampler=sampler,
        key=key,
        soft_tokens=soft_tokens,
        num_samples=num_samples,
        top_logprobs=top_logprobs,
        cache_dtype=cache_dtype,
    )
    arguments = model, request, sampler, jnp.asarray(max_new_tokens, jnp.int32)
    compile_once(_run, *arguments)
    state = _run(*arguments)
    raise_failed(state.failed)
    return Generated(
        new_tokens(state.tokens, request.tokens, max_new_tokens),
        state.cache,
        _shorten(state.logprobs, state.length.ndim, max_new_tokens),
    )


@typed
def stream(
    model: Transformer,
    tokens: Integer[ArrayLike, "*B L"] | Sequence[Any],
    *,
    max_new_tokens: SupportsIndex,
    sampler: AbstractSampler = Greedy(),
    stop_tokens: Ids = (),
    key: Key[Array, "..."] | UInt32[Array, "... 2"] | None = None,
    cache: Cache | None = None,
    soft_tokens: Float[Array, "*B I M D"] | None = None,
    num_samples: SupportsIndex | None = None,
    cache_dtype: DTypeLike | None = None,
) -> TokenStream:
    """Like `generate`, but yields the new token of every row, `[*B]`, as soon as it is known.

    A row that has ended yields −1; the iterator ends with the last row. Its `cache` is the KV
    cache so far.

    **Arguments:** those of `generate`, but for `top_logprobs`.

    **Returns:** an iterator over `int32[*B]`, with `num_samples` `int32[*B samples]`.

    **Raises:** as `generate` does.
    """
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens)
    request = validate_and_pad(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        cache=cache,
        sampler=sampler,
        key=key,
        soft_tokens=soft_tokens,
        num_samples=num_samples,
        cache_dtype=cache_dtype,
        caller="sampling.stream",
    )
    return TokenStream(model, request, sampler, max_new_tokens)


@jax.jit
def _run(
    model: Transformer,
    request: GenerationRequest,
    sampler: AbstractSampler,
    limit: Int[Array, ""],
) -> GenerationState:
    traced = trace_once(model)

    def decode(state: GenerationState) -> GenerationState:
        return decode_step(traced, state, sampler=sampler, stop_tokens=request.stop_tokens)

    # Compiled by itself it is traced once for both loops.
    step = jax.jit(decode)
    masked = partial(_masked, step, limit)
    return while_loop(partial(_unfinished, limit), step, masked, start(model, request, sampler))


def _unfinished(limit: Int[Array, ""], state: GenerationState) -> Bool[Array, ""]:
    return (state.step < limit) & ~state.finished.all()


def _masked(
    step: Callable[[GenerationState], GenerationState],
    limit: Int[Array, ""],
    state: GenerationState,
) -> GenerationState:
    """A step in which finished rows stay as they are."""
    finished = state.finished | (state.step >= limit)
    return step(eqx.tree_at(lambda state: state.finished, state, finished))


def _shorten(logprobs: Logprobs | None, axis: int, steps: int) -> Logprobs | None:
    return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, steps, axis=axis), logprobs)
