"""Generation of token ids: whole answers in one compiled program, or token by token as they come.

Lengths are rounded up to buckets, so that prompts of any length share a handful of programs.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import as_integer
from equigemma._kernels import while_loop
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
from equigemma.sampling._call import Call, Ids, cache_of, new_tokens, prepare
from equigemma.sampling._choose import AbstractChoice, Greedy
from equigemma.sampling._failed import raise_failed
from equigemma.sampling._logprobs import Logprobs
from equigemma.sampling._state import State, decode_step, prefill
from equigemma.sampling._trace_once import trace_once


class Generated(NamedTuple):
    """New tokens of each row, a stop token included; −1 after the end. And what the model saw.

    With `samples=n` the batch `*B` of everything here ends with an axis of n.
    """

    tokens: Int[Array, "*B new"]
    cache: Cache
    logprobs: Logprobs | None = None


@typed
def generate(
    model: Transformer,
    tokens: Integer[ArrayLike, "*B L"] | Sequence[Any],
    *,
    max_new_tokens: SupportsIndex,
    choose: AbstractChoice = Greedy(),
    stop: Ids = (),
    key: Key[Array, "..."] | UInt32[Array, "... 2"] | None = None,
    cache: Cache | None = None,
    soft_tokens: Float[Array, "*B I M D"] | None = None,
    samples: SupportsIndex | None = None,
    logprobs: SupportsIndex | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Generated:
    """Continues each row of `tokens` until a stop token or `max_new_tokens`.

    The whole generation is one compiled program. Rows of different length are padded at the end
    with −1. Call it outside `jit`; inside, use `prefill` and `decode_step`.

    A row gives what it gives alone, up to rounding: a product of several rows adds up in another
    order than that of one. With Gemma 3 270M in float32, log-probabilities then differ by 2e-5. In
    bfloat16 it is 0.1, so that a text parts from that of its prompt alone where two tokens are
    nearly as likely as each other, within 48 tokens every second one did. A call for each prompt
    depends on no batch.

    **Arguments:**

    - `tokens`: prompts, at least one token per row; integers of any type, also lists.
    - `choose`: `Greedy()`, or `Sample(...)`, which needs a `key`; `choice(...)` makes either from
      the usual numbers. Penalties see the tokens of this call, not those in `cache`.
    - `stop`: ids that end a row, in a list, a set or an array.
    - `key`: one key, used alike for every row, or one per row. A row's text depends on its prompt,
      its key and the shape of the batch, not on what its neighbours are.
    - `cache`: what was said before, from an earlier call with room to spare. It is not changed.
    - `soft_tokens`: what `model.encode_images` made of the images of each row. Their places among
      the tokens are those that `nn.insert_image_tokens` gives them.
    - `samples`: so many answers to each prompt, which is read once: the result has a new axis after
      those of the batch. Answer i is that of a call with `jax.random.fold_in(key, i)`.
    - `logprobs`: also return the log-probability of each new token and of so many of the most
      probable ones; 0 is the new token alone. They are the model's own, before any transform.
    - `cache_dtype`: of a new cache, by default the model's. int8 takes half of the memory of
      bfloat16, and rounds keys and values.

    **Raises:** `ValueError` for an empty prompt, a token or a biased id outside the vocabulary, a
    number of tokens, samples or log-probabilities that makes no sense, or a cache without room;
    `NonFiniteLogitsError` for rows in which no token can be chosen.
    """
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens)
    call = prepare(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        stop=stop,
        cache=cache,
        rule=choose,
        key=key,
        soft_tokens=soft_tokens,
        samples=samples,
        logprobs=logprobs,
        cache_dtype=cache_dtype,
    )
    state = _run(model, call, choose, jnp.asarray(max_new_tokens, jnp.int32))
    raise_failed(state.failed)
    return Generated(
        new_tokens(state.tokens, call.tokens, max_new_tokens),
        state.cache,
        _shorten(state.logprobs, state.length.ndim, max_new_tokens),
    )


@typed
def stream(
    model: Transformer,
    tokens: Integer[ArrayLike, "*B L"] | Sequence[Any],
    *,
    max_new_tokens: SupportsIndex,
    choose: AbstractChoice = Greedy(),
    stop: Ids = (),
    key: Key[Array, "..."] | UInt32[Array, "... 2"] | None = None,
    cache: Cache | None = None,
    soft_tokens: Float[Array, "*B I M D"] | None = None,
    samples: SupportsIndex | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Iterator[np.ndarray]:
    """Like `generate`, but yields the new token of every row, `[*B]`, as soon as it is known.

    A row that has ended yields −1; the iterator ends with the last row.
    """
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens)
    call = prepare(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        stop=stop,
        cache=cache,
        rule=choose,
        key=key,
        soft_tokens=soft_tokens,
        samples=samples,
        cache_dtype=cache_dtype,
        caller="sampling.stream",
    )
    return _steps(model, call, choose, max_new_tokens)


@jax.jit
def _start(model: Transformer, call: Call, choose: AbstractChoice) -> State:
    return prefill(
        trace_once(model),
        call.tokens,
        cache_of(model, call),
        choose,
        call.stop,
        call.key,
        soft_tokens=call.soft_tokens,
        chunk=call.chunk,
        samples=call.samples,
        logprobs=call.logprobs,
    )


@jax.jit
def _run(model: Transformer, call: Call, choose: AbstractChoice, limit: Int[Array, ""]) -> State:
    traced = trace_once(model)
    # Compiled by itself it is traced once for both loops.
    step = jax.jit(lambda state: decode_step(traced, state, choose, call.stop))
    masked = partial(_masked, step, limit)
    return while_loop(partial(_goes_on, limit), step, masked, _start(model, call, choose))


def _goes_on(limit: Int[Array, ""], state: State) -> Bool[Array, ""]:
    return (state.step < limit) & ~state.done.all()


def _masked(step: Callable[[State], State], limit: Int[Array, ""], state: State) -> State:
    """A step in which rows that are done stay as they are."""
    done = state.done | (state.step >= limit)
    return step(eqx.tree_at(lambda state: state.done, state, done))


@jax.jit
def _first(model: Transformer, call: Call, choose: AbstractChoice) -> tuple[State, "_Shown"]:
    state = _start(model, call, choose)
    return state, _shown(state)


@partial(jax.jit, donate_argnums=1)
def _advance(
    model: Transformer, state: State, choose: AbstractChoice, stop: Int[Array, " stops"]
) -> tuple[State, "_Shown"]:
    state = decode_step(trace_once(model), state, choose, stop)
    return state, _shown(state)


class _Shown(NamedTuple):
    """Copies for the host, because the next call takes the state's own buffers."""

    newest: Int[Array, "*B"]
    done: Bool[Array, "*B"]
    failed: Bool[Array, "*B"]


def _shown(state: State) -> _Shown:
    return _Shown(*map(jnp.copy, (state.newest, state.done, state.failed)))


def _steps(
    model: Transformer,
    call: Call,
    choose: AbstractChoice,
    max_new_tokens: int,
    compiling: Sequence[Future] = (),
) -> Iterator[np.ndarray]:
    """The new tokens. `compiling`: `_first` and `_advance`, where they are compiled elsewhere."""
    wait(compiling[:1])
    state, shown = _first(model, call, choose)
    raise_failed(shown.failed)
    # The first one is shown before the program of the others is compiled.
    yield np.asarray(shown.newest)
    if max_new_tokens == 1 or np.asarray(shown.done).all():
        return
    wait(compiling)
    state, shown = _advance(model, state, choose, call.stop)
    for remaining in reversed(range(max_new_tokens - 1)):
        # The next step is under way while the caller looks at this one's token.
        ahead = _advance(model, state, choose, call.stop) if remaining else None
        raise_failed(shown.failed)
        yield np.asarray(shown.newest)
        if ahead is None or np.asarray(shown.done).all():
            return
        state, shown = ahead


def _shorten(logprobs: Logprobs | None, axis: int, steps: int) -> Logprobs | None:
    return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, steps, axis=axis), logprobs)
