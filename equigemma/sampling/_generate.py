"""Generation of token ids: whole answers in one compiled program, or token by token as they come.

Lengths are rounded up to buckets, so that prompts of any length share a handful of programs.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._typing import Array, Bool, Int, Key, typed
from equigemma.nn import Cache, Transformer, capacity, init_cache
from equigemma.sampling._choose import AbstractChoice, Greedy
from equigemma.sampling._state import CHUNK, State, decode_step, prefill


class Generated(NamedTuple):
    """New tokens of each row, a stop token included; −1 after the end. And what the model saw."""

    tokens: Int[Array, "*B new"]
    cache: Cache


@typed
def generate(
    model: Transformer,
    tokens: Int[Array, "*B L"],
    *,
    max_new_tokens: int,
    choose: AbstractChoice = Greedy(),
    stop: Sequence[int] = (),
    key: Key[Array, "..."] | None = None,
    cache: Cache | None = None,
) -> Generated:
    """Continues each row of `tokens` until a stop token or `max_new_tokens`.

    The whole generation is one compiled program. Rows of different length are padded at the end
    with −1; each gives exactly what it gives alone. Call it outside `jit`; inside, use `prefill`
    and `decode_step`.

    **Arguments:**

    - `tokens`: prompts, at least one token per row.
    - `choose`: `Greedy()`, or `Sample(...)`, which needs a `key`.
    - `stop`: ids that end a row.
    - `key`: one key, used alike for every row, or one per row. A row's text depends on its prompt
      and its key, not on its neighbours.
    - `cache`: what was said before, from an earlier call with room to spare. It is not changed.

    **Raises:** `ValueError` for an empty prompt, a token outside the vocabulary, a length that is
    not positive, or a cache without room.
    """
    call = _prepare(model, tokens, max_new_tokens, stop, key, cache)
    state = _run(model, call, choose, jnp.asarray(max_new_tokens, jnp.int32))
    return Generated(_new_tokens(state, np.asarray(tokens), max_new_tokens), state.cache)


@typed
def stream(
    model: Transformer,
    tokens: Int[Array, "*B L"],
    *,
    max_new_tokens: int,
    choose: AbstractChoice = Greedy(),
    stop: Sequence[int] = (),
    key: Key[Array, "..."] | None = None,
    cache: Cache | None = None,
) -> Iterator[np.ndarray]:
    """Like `generate`, but yields the new token of every row, `[*B]`, as soon as it is known.

    A row that has ended yields −1; the iterator ends with the last row.
    """
    call = _prepare(model, tokens, max_new_tokens, stop, key, cache)
    return _steps(model, call, choose, max_new_tokens)


class _Call(eqx.Module):
    """The arguments of one generation, padded to their buckets."""

    tokens: Int[Array, "*B T"]
    cache: Cache | None
    stop: Int[Array, " stops"]
    key: Key[Array, "..."] | None
    chunk: int = eqx.field(static=True)


def _prepare(model, tokens, max_new_tokens, stop, key, cache) -> _Call:
    rows = np.asarray(tokens)
    _check(model, rows, max_new_tokens, cache)
    longest = rows.shape[-1]
    total = _bucket(longest + max_new_tokens, _SMALLEST_TOTAL)
    batch = rows.shape[:-1]
    padding = [(0, 0)] * len(batch) + [(0, total - longest)]
    return _Call(
        tokens=jnp.asarray(np.pad(rows, padding, constant_values=-1), jnp.int32),
        cache=cache,
        stop=jnp.asarray(stop, jnp.int32),
        key=key if key is None else jnp.broadcast_to(key, batch),
        chunk=min(CHUNK, _bucket(longest, _SMALLEST_CHUNK)),
    )


def _check(model, rows, max_new_tokens, cache) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    filled = rows >= 0
    if not rows.size or not filled[..., 0].all():
        raise ValueError(
            "Every prompt needs at least one token, from the first place on; got an empty one. "
            "A text starts with the beginning-of-sequence token."
        )
    if (filled[..., 1:] & ~filled[..., :-1]).any():
        raise ValueError("Padding (-1) must come after the prompt of a row, not within it.")
    if rows.max() >= model.config.vocab:
        raise ValueError(
            f"Token {rows.max()} is not in the vocabulary, which ends at {model.config.vocab - 1}."
        )
    if cache is not None:
        needed = int((filled.sum(-1) + np.asarray(cache.length)).max()) + max_new_tokens - 1
        room = capacity(model.config, cache)
        if needed > room:
            raise ValueError(
                f"The cache has room for {room} tokens, but what it holds, the prompt and "
                f"max_new_tokens need {needed}. Make it with init_cache(..., capacity={needed})."
            )


_SMALLEST_CHUNK, _SMALLEST_TOTAL = 32, 256


def _bucket(length: int, smallest: int) -> int:
    """The next power of two, at least `smallest`."""
    return max(smallest, 1 << (length - 1).bit_length())


@jax.jit
def _start(model: Transformer, call: _Call, choose: AbstractChoice) -> State:
    cache = call.cache
    if cache is None:
        *batch, total = call.tokens.shape
        cache = init_cache(model.config, tuple(batch), capacity=total, dtype=model.dtype)
    return prefill(model, call.tokens, cache, choose, call.stop, call.key, chunk=call.chunk)


@jax.jit
def _run(model: Transformer, call: _Call, choose: AbstractChoice, limit: Int[Array, ""]) -> State:
    return jax.lax.while_loop(
        lambda state: (state.step < limit) & ~state.done.all(),
        lambda state: decode_step(model, state, choose, call.stop),
        _start(model, call, choose),
    )


@partial(jax.jit, donate_argnums=1)
def _advance(
    model: Transformer, state: State, choose: AbstractChoice, stop: Int[Array, " stops"]
) -> tuple[State, Int[Array, "*B"], Bool[Array, "*B"]]:
    state = decode_step(model, state, choose, stop)
    # Copies for the host, because the next call takes the state's own buffers.
    return state, jnp.copy(state.newest), jnp.copy(state.done)


def _steps(model, call, choose, max_new_tokens) -> Iterator[np.ndarray]:
    state = _start(model, call, choose)
    newest, done = jnp.copy(state.newest), jnp.copy(state.done)
    for remaining in reversed(range(max_new_tokens)):
        if remaining:
            # The next step is under way while the caller looks at this one's token.
            state, *following = _advance(model, state, choose, call.stop)
        yield np.asarray(newest)
        if not remaining or np.asarray(done).all():
            return
        newest, done = following


def _new_tokens(state: State, prompt: np.ndarray, max_new_tokens: int) -> Int[Array, "*B new"]:
    starts = (prompt >= 0).sum(-1)[..., None]
    rows = np.take_along_axis(np.asarray(state.tokens), starts + np.arange(max_new_tokens), axis=-1)
    return jnp.asarray(rows)
