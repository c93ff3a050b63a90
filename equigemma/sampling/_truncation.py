"""Transforms that cut the vocabulary down: logits of tokens left out become −inf.

None of them sorts: sorting a quarter of a million logits takes longer than many a model takes to
compute them. The largest few are found by `lax.top_k`, and what those cannot decide by bisection,
which is just as exact. Tokens with equal logits stay or go together.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._arguments import as_integer, as_number
from equigemma._kernels import smallest_of_best, threshold_of
from equigemma._typing import Array, Bool, Float, Int, typed


class TopK(eqx.Module):
    """The `k` largest logits, and those equal to the smallest of them."""

    k: int = eqx.field(static=True)

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        del tokens
        wide = logits.astype(jnp.float32)
        return _keep(logits, wide >= smallest_of_best(wide, min(self.k, wide.shape[-1])))


def top_k(k: int) -> TopK:
    """Keeps the `k` most probable tokens. `k` is part of the program: another one compiles again.

    **Raises:** `ValueError` if `k < 1`.

    **Source:** Fan et al. 2018, arXiv:1805.04833.
    """
    k = as_integer("top_k", k)
    if k < 1:
        raise ValueError(f"top_k must keep at least one token, got {k}.")
    return TopK(k)


class TopP(eqx.Module):
    """The most probable tokens that together reach a probability."""

    probability: Float[Array, ""]

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        del tokens
        wide = logits.astype(jnp.float32)
        return _keep(logits, _first_to_reach(wide, jax.nn.softmax(wide), self.probability))


def top_p(probability: float) -> TopP:
    """Keeps the fewest tokens whose probabilities add up to `probability` or more; 1 keeps all.

    **Raises:** `ValueError` unless `0 < probability <= 1`.

    **Source:** Holtzman et al. 2019, arXiv:1904.09751.
    """
    return TopP(_share("top_p", probability))


class MinP(eqx.Module):
    """Tokens with at least a share of the probability of the most probable one."""

    log_share: Float[Array, ""]

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        del tokens
        wide = logits.astype(jnp.float32)
        return _keep(logits, wide >= wide.max(axis=-1, keepdims=True) + self.log_share)


def min_p(share: float) -> MinP:
    """Keeps tokens at least `share` times as probable as the most probable one.

    **Raises:** `ValueError` unless `0 < share <= 1`.

    **Source:** Nguyen et al. 2024, arXiv:2407.01082.
    """
    return MinP(jnp.log(_share("min_p", share)))


class Typical(eqx.Module):
    """Tokens about as surprising as can be expected, that together reach a probability."""

    probability: Float[Array, ""]

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        del tokens
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        probs = jnp.exp(log_probs)
        # A token ruled out before has probability 0 and adds nothing, where 0 · inf is NaN.
        surprise = jnp.where(probs > 0, -log_probs, 0)
        entropy = (probs * surprise).sum(axis=-1, keepdims=True)
        distance = jnp.abs(log_probs + entropy)
        return _keep(logits, _first_to_reach(-distance, probs, self.probability))


def typical(probability: float) -> Typical:
    """Keeps the tokens whose surprise −log p is closest to the entropy, up to `probability` of all.

    The most probable token may be among those left out. 1 keeps all.

    **Raises:** `ValueError` unless `0 < probability <= 1`.

    **Source:** Meister et al. 2022, arXiv:2202.00666.
    """
    return Typical(_share("typical", probability))


def _share(name: str, value: float) -> Float[Array, ""]:
    value = as_number(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}.")
    return jnp.asarray(value, jnp.float32)


def _keep(logits, kept):
    return jnp.where(kept, logits, -jnp.inf)


_HEAD = 256
"""So many of the best tokens are looked at first; fewer take `lax.top_k` on CPU no less time."""


def _first_to_reach(
    scores: Float[Array, "*B V"], probs: Float[Array, "*B V"], goal: Float[Array, ""]
) -> Bool[Array, "*B V"]:
    """True for the tokens of highest score, as few as have the probability `goal` together."""
    size = min(_HEAD, scores.shape[-1])
    best, ids = jax.lax.top_k(scores, size)
    reached = jnp.cumsum(jnp.take_along_axis(probs, ids, axis=-1), axis=-1)
    place = jnp.sum(reached < goal, axis=-1, keepdims=True)
    near = jnp.take_along_axis(best, jnp.minimum(place, size - 1), axis=-1)
    decided = place < size

    def search():
        # Row by row, so that no row depends on whether its neighbours could be decided at once.
        return jnp.where(decided, near, threshold_of(scores, probs, goal))

    threshold = jax.lax.cond(decided.all(), lambda: near, search)
    return (scores >= threshold) | (goal >= 1)
