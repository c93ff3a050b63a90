"""Generation token by token, with the KV cache in hand at any time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equigemma._kernels import on_auto_axes
from equigemma._typing import Array, Bool, Int
from equigemma.nn import Cache, Transformer
from equigemma.sampling._failed import raise_failed
from equigemma.sampling._on_host import on_host
from equigemma.sampling._request import GenerationRequest, start
from equigemma.sampling._sampler import AbstractSampler
from equigemma.sampling._state import GenerationState, decode_step
from equigemma.sampling._trace_once import trace_once


class TokenStream(Iterator[np.ndarray]):
    """The new token of every row, `int32[*B]`, as soon as it is known; −1 in rows that have ended.

    It ends with the last row. The next step is under way while the caller looks at a token.

    **Raises:** `NonFiniteLogitsError` where no token can be sampled.
    """

    def __init__(
        self,
        model: Transformer,
        request: GenerationRequest,
        sampler: AbstractSampler,
        max_new_tokens: int,
        compiling: Sequence[Future] = (),
    ):
        """A stream of which nothing is computed yet.

        **Arguments:**

        - `model`, `sampler`, `max_new_tokens`: those of `stream`.
        - `request`: its other arguments, checked and padded.
        - `compiling`: `first` and `advance`, where another thread compiles them.
        """
        self._model, self._request, self._sampler = model, request, sampler
        self._compiling = compiling
        self._tokens = self._generate(max_new_tokens)

    @property
    def cache(self) -> Cache:
        """KV cache of the prompt and the tokens given out; the next step donates its buffers."""
        return self._state.cache

    def __next__(self) -> np.ndarray:
        return next(self._tokens)

    # Prefill waits for the first token to be asked for, as the compiler takes seconds.
    @cached_property
    def _state(self) -> GenerationState:
        return self._first[0]

    @cached_property
    def _first(self) -> tuple[GenerationState, "ForHost"]:
        wait(self._compiling[:1])
        return on_auto_axes()(first)(self._model, self._request, self._sampler)

    def _generate(self, max_new_tokens: int) -> Iterator[np.ndarray]:
        _, shown = self._first
        raise_failed(shown.failed)
        # The first token is shown before the program of the others is compiled.
        yield on_host(shown.last_token)
        if max_new_tokens == 1 or on_host(shown.finished).all():
            return
        wait(self._compiling)
        shown = self._advance()
        for remaining in reversed(range(max_new_tokens - 1)):
            ahead = self._advance() if remaining else None
            raise_failed(shown.failed)
            yield on_host(shown.last_token)
            if ahead is None or on_host(shown.finished).all():
                return
            shown = ahead

    def _advance(self) -> "ForHost":
        self._state, shown = on_auto_axes()(advance)(
            self._model, self._state, self._sampler, self._request.stop_tokens
        )
        return shown


class ForHost(NamedTuple):
    """Copies for the host, because the next call takes the state's own buffers."""

    last_token: Int[Array, "*B"]
    finished: Bool[Array, "*B"]
    failed: Bool[Array, "*B"]


def _for_host(state: GenerationState) -> ForHost:
    return ForHost(*map(jnp.copy, (state.last_token, state.finished, state.failed)))


@jax.jit
def first(
    model: Transformer, request: GenerationRequest, sampler: AbstractSampler
) -> tuple[GenerationState, ForHost]:
    """Prefill and the first token."""
    state = start(model, request, sampler)
    return state, _for_host(state)


@partial(jax.jit, donate_argnums=1)
def advance(
    model: Transformer,
    state: GenerationState,
    sampler: AbstractSampler,
    stop_tokens: Int[Array, " stops"],
) -> tuple[GenerationState, ForHost]:
    """One decoding step."""
    state = decode_step(trace_once(model), state, sampler=sampler, stop_tokens=stop_tokens)
    return state, _for_host(state)
