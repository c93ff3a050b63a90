"""AltUp: parallel residual streams, of which each layer computes the first and predicts the others.

The layer around it is in `_altup_block.py`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import widened
from equigemma._typing import Array, Float, PRNGKeyArray, typed
from equigemma.config import AltUpConfig, NormConfig
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._init import random_weight
from equigemma.nn._norm import RMSNorm
from equigemma.nn._stream import AbstractStream
from equigemma.nn._summary import shallow_repr, summary


_SMALLEST = 1e-12
"""Magnitude below which a vector is not stretched further."""


class AltUpStream(AbstractStream):
    """The embedding and projections of it on the way in, their mean on the way out.

    Projections are scaled to the magnitude of the first stream, both ways.

    **Source:** gemma `gm/nn/gemma3n/_transformer.py`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    spread: tuple[AbstractEinsum, ...]
    gather: tuple[AbstractEinsum, ...]

    def __init__(self, width: int, config: AltUpConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        keys = jax.random.split(key, (2, config.streams - 1))
        self.spread, self.gather = (
            tuple(Einsum("...D,DO->...O", (width, width), key=k, dtype=dtype) for k in half)
            for half in keys
        )

    @typed
    def expand(self, x: Float[Array, "*B L D"]) -> Float[Array, "A *B L D"]:
        with jax.named_scope("spread"):
            return jnp.stack([x, *(_match_magnitude(x, project(x)) for project in self.spread)])

    @typed
    def reduce(self, stream: Float[Array, "A *B L D"]) -> Float[Array, "*B L D"]:
        with jax.named_scope("gather"):
            first, *others = stream
            gathered = [
                _match_magnitude(first, project(other))
                for project, other in zip(self.gather, others, strict=True)
            ]
            return jnp.stack([first, *gathered]).mean(axis=0)


def _match_magnitude(target: Float[Array, "*B D"], x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """`x` stretched to the root mean square of `target`; statistics in float32 or wider."""
    wide = widened(x)
    factor = _magnitude(target) / jnp.maximum(_magnitude(wide), _SMALLEST)
    return (wide * factor).astype(x.dtype)


def _magnitude(x: Float[Array, "*B D"]) -> Float[Array, "*B 1"]:
    return jnp.sqrt(jnp.mean(jnp.square(widened(x)), axis=-1, keepdims=True))


class AltUp(eqx.Module):
    """Predicts all streams from one another, and corrects them by what the layer made of the first.

    Mixing coefficients depend on the token, through a router with a few modes; they and the mixing
    are float32 or wider.

    **Source:** Baykal et al. 2023, arXiv:2301.13310; gemma `gm/nn/gemma3n/_modules.py::AltUp`.
    """

    router_norm: RMSNorm
    router: AbstractEinsum
    prediction: Float[Array, "U A A"]
    correction: Float[Array, "U A"]
    output_scale: Float[Array, " D"]
    clip: float | None = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        config: AltUpConfig,
        norm: NormConfig,
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype,
    ):
        router_key, prediction_key, correction_key = jax.random.split(key, 3)
        modes, streams = config.modes, config.streams
        self.router_norm = RMSNorm(width, norm, dtype=dtype)
        self.router = Einsum("...D,DU->...U", (width, modes), key=router_key, dtype=dtype)
        self.prediction = random_weight(prediction_key, (modes, streams, streams), 1e-4, dtype)
        self.correction = random_weight(correction_key, (modes, streams), 1e-2, dtype)
        self.output_scale = jnp.ones(width, dtype)
        self.clip = config.clip

    @typed
    def predict(self, stream: Float[Array, "A *B L D"]) -> Float[Array, "A *B L D"]:
        """Each stream plus a mixture of all of them."""
        with jax.named_scope("predict"):
            modes, mixing = self._modes(stream[0]), self._clipped(self.prediction)
            mixing = jnp.einsum("...u,uij->ij...", modes, mixing)
            wide = widened(stream)
            # A sum of few terms, not a product of matrices: it fuses with what follows.
            return (wide + (mixing[..., None] * wide[None]).sum(axis=1)).astype(stream.dtype)

    @typed
    def correct(
        self, predicted: Float[Array, "A *B L D"], computed: Float[Array, "*B L D"]
    ) -> Float[Array, "A *B L D"]:
        """Each prediction plus a share of how far the first was from what the layer computed."""
        with jax.named_scope("correct"):
            modes, share = self._modes(computed), self._clipped(self.correction)
            share = jnp.einsum("...u,ui->i...", modes, share)
            error = widened(computed) - widened(predicted[0])
            corrected = widened(predicted) + (1 + share)[..., None] * error[None]
            return corrected.astype(predicted.dtype)

    @typed
    def scaled(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """`x` times the learned scale."""
        return x * jnp.broadcast_to(self.output_scale.astype(x.dtype), x.shape)

    def _modes(self, x: Float[Array, "*B D"]) -> Float[Array, "*B U"]:
        logits = self.router(self.router_norm(x) * jnp.asarray(1 / x.shape[-1], x.dtype))
        return jnp.tanh(widened(logits))

    def _clipped(self, coefficients: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = widened(coefficients)
        return wide if self.clip is None else jnp.clip(wide, -self.clip, self.clip)
