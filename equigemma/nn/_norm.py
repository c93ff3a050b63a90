"""Root-mean-square normalisation. Statistics in float32, the result in the dtype of the input."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, typed
from equigemma.config import NormConfig


class RMSNorm(eqx.Module):
    """Divides by the root of the mean square over the last axis, then scales by `offset + scale`.

    The computation runs in float32 and is cast back: squares of bfloat16 activations lose half of
    their digits, and float16 overflows.

    **Source:** Zhang & Sennrich 2019, arXiv:1910.07467; gemma `gm/nn/_layers.py::RMSNorm`.
    """

    scale: Float[Array, " D"] | None
    config: NormConfig = eqx.field(static=True)

    def __init__(self, size: int, config: NormConfig, *, dtype: jnp.dtype | type = jnp.float32):
        # The stored scale is the distance from `offset`; a fresh norm multiplies by one.
        self.scale = None if config.offset is None else jnp.full(size, 1 - config.offset, dtype)
        self.config = config

    @typed
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        with jax.named_scope("norm"):
            wide = x.astype(jnp.float32)
            mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
            normed = wide * jax.lax.rsqrt(mean_square + self.config.epsilon)
            offset = self.config.offset
            if self.scale is not None and offset is not None:
                factor = offset + self.scale.astype(jnp.float32)
                normed = normed * jnp.broadcast_to(factor, x.shape)
            return normed.astype(x.dtype)


def optional_norm(
    size: int, config: NormConfig | None, *, dtype: jnp.dtype | type
) -> RMSNorm | None:
    """A fresh norm, or None where the config has none."""
    return None if config is None else RMSNorm(size, config, dtype=dtype)


def normed(norm: Callable[[Array], Array] | None, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """`norm(x)`, or `x` where there is no norm."""
    return x if norm is None else norm(x)
