"""Steering: directions of the residual stream, and changes that add or remove them."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp

from equigemma._arguments import described
from equigemma._typing import Array, ArrayLike, Bool, Float, typed


@typed
def direction(positive: Float[Array, "*B D"], negative: Float[Array, "*C D"]) -> Float[Array, " D"]:
    """The difference of two means, in float32: from examples without a property to those with it.

    **Arguments:**

    - `positive`: values of examples with the property, at one site, of any number of texts and
      positions.
    - `negative`: values of those without it.

    **Returns:** mean of `positive` − mean of `negative`.

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
        """`x` in its dtype, after the sum.

        **Arguments:** `x`: values at a site.

        **Returns:** `x` + strength · direction, in the dtype of `x`.
        """
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
        """`x` in its dtype; the component is computed in float32 or wider.

        **Arguments:** `x`: values at a site.

        **Returns:** `x` without its component along the direction, in its dtype.
        """
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        vector = self.direction.astype(wide.dtype)
        unit = jnp.broadcast_to(vector / jnp.linalg.norm(vector), wide.shape)
        along = (wide * unit).sum(axis=-1, keepdims=True)
        return (wide - along * unit).astype(x.dtype)


class Shift(eqx.Module):
    """A change for `patch`: adds an array, in the dtype of what it is added to."""

    shift: Float[Array, "..."]

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`x + shift`."""
        return x + jnp.broadcast_to(self.shift.astype(x.dtype), x.shape)


class LinearProbe(eqx.Module):
    """A condition for `Where`: whether `x · direction + bias > 0`, in float32 or wider.

    Attributes:
        direction: `[D]`, such as the weights of a logistic regression, or a `direction`.
        bias: A number.
    """

    direction: Float[Array, " D"]
    bias: Float[Array, ""]

    def __init__(self, direction: Float[Array, " D"], bias: float | Float[ArrayLike, ""] = 0.0):
        """The probe.

        **Arguments:**

        - `direction`: `[D]`.
        - `bias`: a number; minus the threshold of the product.
        """
        self.direction = jnp.asarray(direction)
        self.bias = jnp.asarray(bias, self.direction.dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Bool[Array, "*B"]:
        """For each vector whether the probe finds what it looks for.

        **Arguments:** `x`: values at a site.

        **Returns:** one truth value for each vector.
        """
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        product = wide * jnp.broadcast_to(self.direction.astype(wide.dtype), wide.shape)
        return product.sum(axis=-1) + self.bias.astype(wide.dtype) > 0


class Where(eqx.Module):
    """A change for `patch` that is made where a condition holds, vector by vector.

    Within cached generation each new token is judged by its own value.

    ```python
    refuses = interpret.LinearProbe(vector, bias=-3.0)
    changes = {"layers.9.resid_post": interpret.Where(refuses, interpret.Ablate(vector))}
    ```

    **Source:** Lee et al. 2024, arXiv:2409.05907.

    Attributes:
        condition: A function from values `[*B D]` to truth values `[*B]`, such as a `LinearProbe`.
        change: A function from values to values of the same shape, such as `Add` or `Ablate`.
    """

    condition: Callable[[Array], Array]
    change: Callable[[Array], Array]

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """`change(x)` where the condition holds, else `x`.

        **Arguments:** `x`: values at a site.

        **Returns:** values of the shape and dtype of `x`.

        **Raises:** `ValueError` if the condition is not one truth value for each vector.
        """
        holds = self.condition(x)
        if holds.shape != x.shape[:-1] or holds.dtype != bool:
            raise ValueError(
                f"The condition must give one truth value for each vector, bool{x.shape[:-1]}; got "
                f"{described(holds)}."
            )
        return jnp.where(holds[..., None], self.change(x).astype(x.dtype), x)
