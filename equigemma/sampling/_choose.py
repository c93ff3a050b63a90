"""From logits to a token: transforms of logits, chained, and the two ways to choose.

A transform maps logits `[*B V]` to logits, given the tokens seen so far `[*B T]` (−1 where empty). It
is a module, so its numbers are array leaves and other values need no new compilation.
"""

from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, Int, Key, typed


Transform = Callable[[Float[Array, "*B V"], Int[Array, "*B T"]], Float[Array, "*B V"]]


class AbstractChoice(eqx.Module):
    """How the next token of every row is chosen."""

    @abstractmethod
    def __call__(
        self,
        logits: Float[Array, "*B V"],
        tokens: Int[Array, "*B T"],
        key: Key[Array, "..."] | None,
    ) -> Int[Array, "*B"]:
        """One token per row; `key` has one key per row, or is None where no chance is involved."""


class Greedy(AbstractChoice):
    """The most probable token; of equals, the first."""

    transform: Transform | None = None

    @typed
    def __call__(
        self,
        logits: Float[Array, "*B V"],
        tokens: Int[Array, "*B T"],
        key: Key[Array, "..."] | None,
    ) -> Int[Array, "*B"]:
        del key
        if self.transform is not None:
            logits = self.transform(logits, tokens)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


class Sample(AbstractChoice):
    """A token drawn from the softmax of the transformed logits.

    Rows with equal keys draw with equal noise: a row's text depends on its prompt and key alone.
    """

    transform: Transform | None = None

    @typed
    def __call__(
        self,
        logits: Float[Array, "*B V"],
        tokens: Int[Array, "*B T"],
        key: Key[Array, "..."] | None,
    ) -> Int[Array, "*B"]:
        if key is None:
            raise ValueError("Drawing a token needs randomness: pass key=jax.random.key(seed).")
        if self.transform is not None:
            logits = self.transform(logits, tokens)
        draw = jax.random.categorical
        for _ in range(key.ndim):
            draw = jax.vmap(draw)
        return draw(key, logits).astype(jnp.int32)


class Temperature(eqx.Module):
    """Logits divided by a temperature above 0."""

    value: Float[Array, ""]

    def __call__(self, logits, tokens):
        del tokens
        return logits / self.value


class Chain(eqx.Module):
    """Transforms one after the other, in the order given."""

    transforms: tuple[Transform, ...]

    def __call__(self, logits, tokens):
        for transform in self.transforms:
            logits = transform(logits, tokens)
        return logits


def chain(*transforms: Transform) -> Chain:
    """One transform that applies all of these in the order given."""
    return Chain(transforms)


def temperature(value: float) -> Temperature:
    """Divides logits by `value`: below 1 sharper, above 1 flatter.

    **Raises:** `ValueError` unless `value > 0`; temperature 0 is `Greedy()`.
    """
    if not value > 0:
        raise ValueError(f"A temperature must be above 0, got {value}; for 0 choose Greedy().")
    return Temperature(jnp.asarray(value, jnp.float32))


def at_temperature(value: float, *transforms: Transform) -> AbstractChoice:
    """The usual choice: greedy at temperature 0, else drawn at that temperature after `transforms`.

    **Raises:** `ValueError` if `value` is negative or not a number.
    """
    if value == 0:
        return Greedy(chain(*transforms) if transforms else None)
    return Sample(chain(temperature(value), *transforms))
