"""Generation of one answer, token by token, with the cache in hand at any time."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from equigemma import sampling
from equigemma._typing import Array, Bool, Float, Int, Key
from equigemma.nn import Cache, Transformer
from equigemma.sampling._failed import raise_failed


class Generation:
    """Iterates over the new tokens of one row, a stop token included.

    The next step is under way while the caller looks at a token. The cache has read no token that
    the caller has not seen.

    **Raises:** `sampling.NonFiniteLogitsError` where no token can be chosen.
    """

    def __init__(
        self,
        model: Transformer,
        ids: Sequence[int],
        cache: Cache,
        *,
        max_new_tokens: int,
        choose: sampling.AbstractChoice,
        stop: Sequence[int],
        key: Key[Array, ""],
        soft_tokens: Float[Array, "I M D"] | None = None,
    ):
        """Reads `ids`, among them the soft tokens `soft_tokens`, and begins with the answer."""
        total = _bucket(len(ids) + max_new_tokens, 256)
        row = np.full(total, -1, np.int32)
        row[: len(ids)] = ids
        self._model, self._choose = model, choose
        self._stop = jnp.asarray(stop, jnp.int32)
        self._remaining = max_new_tokens
        chunk = min(sampling.CHUNK, _bucket(len(ids), 32))
        if soft_tokens is not None:
            # An image is read at once.
            chunk = max(chunk, _bucket(soft_tokens.shape[-2], 32))
        self._state = _start(
            model,
            jnp.asarray(row),
            cache,
            choose,
            self._stop,
            key,
            soft_tokens,
            chunk=chunk,
        )
        self._ahead = jnp.copy(self._state.newest), jnp.copy(self._state.done)
        self._done = False

    @property
    def cache(self) -> Cache:
        """All that was read so far. Iterating further takes it away."""
        return self._state.cache

    def __iter__(self) -> "Generation":
        return self

    def __next__(self) -> int:
        if self._done or not self._remaining:
            raise StopIteration
        newest, done = self._ahead
        self._remaining -= 1
        if self._remaining:
            self._state, *self._ahead = _advance(self._model, self._state, self._choose, self._stop)
        self._done = bool(done)
        if newest < 0:
            raise_failed(done)
        return int(newest)


@partial(jax.jit, static_argnames="chunk")
def _start(model, tokens, cache, choose, stop, key, soft_tokens, *, chunk: int) -> sampling.State:
    return sampling.prefill(
        model, tokens, cache, choose, stop, key, soft_tokens=soft_tokens, chunk=chunk
    )


@partial(jax.jit, donate_argnums=1)
def _advance(model, state, choose, stop) -> tuple[sampling.State, Int[Array, ""], Bool[Array, ""]]:
    state = sampling.decode_step(model, state, choose, stop)
    # Copies for the host, because the next call takes the state's own buffers.
    return state, jnp.copy(state.newest), jnp.copy(state.done)


def _bucket(length: int, smallest: int) -> int:
    """The next power of two, at least `smallest`: few programs serve all lengths."""
    return max(smallest, 1 << (length - 1).bit_length())
