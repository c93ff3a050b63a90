"""Normalisation. Statistics in float32 or wider, the result in the dtype of the input."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import widened
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
            wide = widened(x)
            mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
            normed = wide * jax.lax.rsqrt(mean_square + self.config.epsilon)
            offset = self.config.offset
            if self.scale is not None and offset is not None:
                factor = offset + self.scale.astype(wide.dtype)
                normed = normed * jnp.broadcast_to(factor, x.shape)
            return normed.astype(x.dtype)


class LayerNorm(eqx.Module):
    """Subtracts the mean over the last axis, divides by the standard deviation, scales and shifts.

    **Source:** Ba et al. 2016, arXiv:1607.06450.
    """

    scale: Float[Array, " D"]
    bias: Float[Array, " D"] | None
    epsilon: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        epsilon: float,
        *,
        use_bias: bool = True,
        dtype: jnp.dtype | type = jnp.float32,
    ):
        self.scale = jnp.ones(size, dtype)
        self.bias = jnp.zeros(size, dtype) if use_bias else None
        self.epsilon = epsilon

    @typed
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        with jax.named_scope("norm"):
            wide = widened(x)
            centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
            variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
            normed = centred * jax.lax.rsqrt(variance + self.epsilon)
            normed = normed * jnp.broadcast_to(self.scale.astype(wide.dtype), x.shape)
            if self.bias is not None:
                normed = normed + jnp.broadcast_to(self.bias.astype(wide.dtype), x.shape)
            return normed.astype(x.dtype)


def optional_norm(
    size: int, config: NormConfig | None, *, dtype: jnp.dtype | type
) -> RMSNorm | None:
    """A fresh norm, or None where the config has none."""
    return None if config is None else RMSNorm(size, config, dtype=dtype)


def normed(norm: Callable[[Array], Array] | None, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """`norm(x)`, or `x` where there is no norm."""
    return x if norm is None else norm(x)
