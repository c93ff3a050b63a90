"""Thresholds among the scores of a vocabulary, found without sorting it."""

import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, Int


def smallest_of_best(scores: Float[Array, "*B V"], count: int) -> Float[Array, "*B 1"]:
    """The smallest of the `count` largest scores: `jnp.sort(scores)[..., -count, None]`."""
    best, _ = jax.lax.top_k(scores, count)
    # Not best[..., -1:]: for a slice of it alone, XLA on CPU sorts all; seen with jax 0.10.2.
    return best.min(axis=-1, keepdims=True)


def threshold_of(
    scores: Float[Array, "*B V"], probs: Float[Array, "*B V"], goal: Float[Array, ""]
) -> Float[Array, "*B 1"]:
    """The highest score at and above which tokens have at least the probability `goal`.

    Of each row `max(s for s in scores if probs[scores >= s].sum() >= goal)`.

    The search halves the integers that float32 numbers are in order of size, so 32 steps end at a
    score that occurs. A step costs one pass over the vocabulary.
    """
    ranks = _rank(scores)

    def halve(_, bounds: tuple[Array, Array]):
        low, high = bounds
        # The mean without the overflow of the sum.
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = jnp.where(ranks >= middle, probs, 0).sum(axis=-1, keepdims=True) >= goal
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bounds = ranks.min(axis=-1, keepdims=True), ranks.max(axis=-1, keepdims=True) + 1
    low, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jax.lax.bitcast_convert_type(_flip(low), jnp.float32)


def _rank(scores: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of the numbers."""
    return _flip(jax.lax.bitcast_convert_type(scores, jnp.int32))


def _flip(bits: Int[Array, "..."]) -> Int[Array, "..."]:
    # Bits below the sign count upwards away from zero, on both sides of it. Its own inverse.
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
