"""Sparse autoencoders as Equinox modules: which features are active, and what they add up to.

With `skip`, or where both sides differ in width or place, it is a transcoder. The bias `b_dec` is
not subtracted from the input: in Gemma Scope it is added on the way out only.
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float


class AbstractSAE(eqx.Module):
    """Activations to sparse features and back. `n` is the number of features."""

    w_enc: eqx.AbstractVar[Float[Array, "d n"]]
    w_dec: eqx.AbstractVar[Float[Array, "n d_out"]]
    b_dec: eqx.AbstractVar[Float[Array, " d_out"]]
    skip: eqx.AbstractVar[Float[Array, "d d_out"] | None]

    @abstractmethod
    def encode(self, x: Float[Array, "*B d"]) -> Float[Array, "*B n"]:
        """The features of activations, in the dtype of the weights; most are 0."""

    def decode(self, features: Float[Array, "*B n"]) -> Float[Array, "*B d_out"]:
        """What features add up to, without the affine skip connection."""
        return _plus(features @ self.w_dec, self.b_dec)

    def __call__(self, x: Float[Array, "*B d"]) -> Float[Array, "*B d_out"]:
        """The reconstruction of `x`; of a transcoder, of what the layer makes of it.

        **Arguments:** `x`: what the SAE reads, see `inputs`.

        **Returns:** what it writes, an affine skip connection included.
        """
        return add_skip(self.decode(self.encode(x)), self, x)


def _plus(x: Array, bias: Array) -> Array:
    return x + jnp.broadcast_to(bias, x.shape)


def add_skip(out: Array, sae: AbstractSAE, x: Array) -> Array:
    """`out` plus the affine skip connection from `x`, where there is one."""
    return out if sae.skip is None else out + x.astype(sae.skip.dtype) @ sae.skip


def _linear(x: Array, weight: Array, bias: Array) -> Array:
    return _plus(x.astype(weight.dtype) @ weight, bias)


class JumpReLU(AbstractSAE):
    """A feature is its pre-activation, where that is above a threshold of its own.

    **Source:** Rajamanoharan et al. 2024, arXiv:2407.14435; Lieberum et al. 2024, arXiv:2408.05147.
    """

    w_enc: Float[Array, "d n"]
    w_dec: Float[Array, "n d_out"]
    b_enc: Float[Array, " n"]
    b_dec: Float[Array, " d_out"]
    threshold: Float[Array, " n"]
    skip: Float[Array, "d d_out"] | None = None

    def encode(self, x: Float[Array, "*B d"]) -> Float[Array, "*B n"]:
        before = _linear(x, self.w_enc, self.b_enc)
        is_active = before > jnp.broadcast_to(self.threshold, before.shape)
        return jax.nn.relu(before) * is_active.astype(before.dtype)


class Gated(AbstractSAE):
    """One path decides which features are active, another one by how much; they share weights.

    **Source:** Rajamanoharan et al. 2024, arXiv:2404.16014.
    """

    w_enc: Float[Array, "d n"]
    w_dec: Float[Array, "n d_out"]
    b_gate: Float[Array, " n"]
    b_mag: Float[Array, " n"]
    r_mag: Float[Array, " n"]
    b_dec: Float[Array, " d_out"]
    skip: Float[Array, "d d_out"] | None = None

    def encode(self, x: Float[Array, "*B d"]) -> Float[Array, "*B n"]:
        product = x.astype(self.w_enc.dtype) @ self.w_enc
        gate = _plus(product, self.b_gate) > 0
        magnitude = product * jnp.broadcast_to(jnp.exp(self.r_mag), product.shape)
        return jax.nn.relu(_plus(magnitude, self.b_mag)) * gate.astype(product.dtype)


class TopK(AbstractSAE):
    """The `k` largest pre-activations are features, where they are positive.

    **Source:** Gao et al. 2024, arXiv:2406.04093.
    """

    w_enc: Float[Array, "d n"]
    w_dec: Float[Array, "n d_out"]
    b_enc: Float[Array, " n"]
    b_dec: Float[Array, " d_out"]
    k: int = eqx.field(static=True)
    skip: Float[Array, "d d_out"] | None = None

    def encode(self, x: Float[Array, "*B d"]) -> Float[Array, "*B n"]:
        before = _linear(x, self.w_enc, self.b_enc)
        values, chosen = jax.lax.top_k(before, self.k)
        rows = jnp.zeros_like(before).reshape(-1, before.shape[-1])
        each = jnp.arange(len(rows))[:, None]
        new = jax.nn.relu(values).reshape(-1, self.k)
        return rows.at[each, chosen.reshape(-1, self.k)].set(new).reshape(before.shape)
