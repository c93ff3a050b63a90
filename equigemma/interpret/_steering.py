"""Steering: directions of the residual stream, and changes that add or remove them."""

import equinox as eqx
import jax.numpy as jnp

from equigemma._typing import Array, ArrayLike, Float, typed


@typed
def direction(positive: Float[Array, "*B D"], negative: Float[Array, "*C D"]) -> Float[Array, " D"]:
    """The difference of two means, in float32: from examples without a property to those with it.

    **Arguments:** values at one site, of any number of texts and positions.

    **Source:** Marks and Tegmark 2023, arXiv:2310.06824; Rimsky et al. 2023, arXiv:2312.06681.
    """
    means = (
        x.astype(jnp.float32).reshape(-1, x.shape[-1]).mean(axis=0) for x in (positive, negative)
    )
    ahead, behind = means
    return ahead - behind


class Add(eqx.Module):
    """A change for `patch`: adds `strength · direction` to every vector.

    Both are arrays of the model: other ones need no new program, and optax can train them.
    """

    direction: Float[Array, " D"]
    strength: Float[Array, ""]

    def __init__(self, direction: Float[Array, " D"], strength: float | Float[ArrayLike, ""] = 1.0):
        self.direction = jnp.asarray(direction)
        self.strength = jnp.asarray(strength, self.direction.dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """`x` in its dtype, after the sum."""
        step = (self.strength * self.direction).astype(x.dtype)
        return x + jnp.broadcast_to(step, x.shape)


class Ablate(eqx.Module):
    """A change for `patch`: removes from every vector its component along `direction`.

    **Source:** Arditi et al. 2024, arXiv:2406.11717.
    """

    direction: Float[Array, " D"]

    def __init__(self, direction: Float[Array, " D"]):
        self.direction = jnp.asarray(direction)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """`x` in its dtype; the component is computed in float32 or wider."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        vector = self.direction.astype(wide.dtype)
        unit = jnp.broadcast_to(vector / jnp.linalg.norm(vector), wide.shape)
        along = (wide * unit).sum(axis=-1, keepdims=True)
        return (wide - along * unit).astype(x.dtype)
