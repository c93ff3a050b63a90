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
    """Keeps the `k` most probable tokens, and those equal to the least of them.

    `k` is part of the program: another one compiles again.

    **Raises:** `ValueError` if `k < 1`.

    **Source:** Fan et al. 2018, arXiv:1805.04833.
    """

    k: int = eqx.field(static=True)

    def __init__(self, k: int):
        self.k = as_integer("top_k", k)
        if self.k < 1:
            raise ValueError(f"top_k must keep at least one token, got {self.k}.")

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        del tokens
        wide = logits.astype(jnp.float32)
        return _keep(logits, wide >= smallest_of_best(wide, min(self.k, wide.shape[-1])))


top_k = TopK


class TopP(eqx.Module):
    """Nucleus sampling: keeps the fewest tokens whose probabilities add up to `probability`.

    1 keeps all.

    **Raises:** `ValueError` unless `0 < probability <= 1`.

    **Source:** Holtzman et al. 2019, arXiv:1904.09751.
    """

    probability: Float[Array, ""]

    def __init__(self, probability: float):
        self.probability = _probability("top_p", probability)

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        del tokens
        wide = logits.astype(jnp.float32)
        return _keep(logits, _nucleus_mask(wide, jax.nn.softmax(wide), self.probability))


top_p = TopP


class MinP(eqx.Module):
    """Keeps tokens at least `share` times as probable as the most probable one.

    **Raises:** `ValueError` unless `0 < share <= 1`.

    **Source:** Nguyen et al. 2024, arXiv:2407.01082.
    """

    log_share: Float[Array, ""]

    def __init__(self, share: float):
        self.log_share = jnp.log(_probability("min_p", share))

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        del tokens
        wide = logits.astype(jnp.float32)
        return _keep(logits, wide >= wide.max(axis=-1, keepdims=True) + self.log_share)


min_p = MinP


class Typical(eqx.Module):
    """Locally typical sampling: keeps tokens whose surprise −log p is closest to the entropy.

    As many as have `probability` together; the most probable one may be among those left out. 1
    keeps all.

    **Raises:** `ValueError` unless `0 < probability <= 1`.

    **Source:** Meister et al. 2022, arXiv:2202.00666.
    """

    probability: Float[Array, ""]

    def __init__(self, probability: float):
        self.probability = _probability("typical", probability)

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
        return _keep(logits, _nucleus_mask(-distance, probs, self.probability))


typical = Typical


def _probability(name: str, value: float) -> Float[Array, ""]:
    value = as_number(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}.")
    return jnp.asarray(value, jnp.float32)


def _keep(logits: Float[Array, "*B V"], kept: Bool[Array, "*B V"]) -> Float[Array, "*B V"]:
    return jnp.where(kept, logits, -jnp.inf)


TOP_K_PROBE = 256
"""So many of the best tokens are looked at first; fewer take `lax.top_k` on CPU no less time."""


def _nucleus_mask(
    scores: Float[Array, "*B V"], probs: Float[Array, "*B V"], target_mass: Float[Array, ""]
) -> Bool[Array, "*B V"]:
    """True for the tokens of highest score, as few as have the mass `target_mass` together."""
    size = min(TOP_K_PROBE, scores.shape[-1])
    best, ids = jax.lax.top_k(scores, size)
    reached = jnp.cumsum(jnp.take_along_axis(probs, ids, axis=-1), axis=-1)
    place = jnp.sum(reached < target_mass, axis=-1, keepdims=True)
    near = jnp.take_along_axis(best, jnp.minimum(place, size - 1), axis=-1)
    decided = place < size

    def search():
        # Row by row, so that no row depends on whether its neighbours could be decided at once.
        return jnp.where(decided, near, threshold_of(scores, probs, target_mass))

    threshold = jax.lax.cond(decided.all(), lambda: near, search)
    return (scores >= threshold) | (target_mass >= 1)
