"""Linear maps between bounds that a checkpoint stores."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, PRNGKeyArray
from equigemma.nn._einsum import AbstractEinsum, Einsum


class ClippedLinear(eqx.Module):
    """A linear map without bias, whose input and output are clipped to stored bounds.

    Bounds are buffers rather than weights: no gradient reaches them. Leave them out of what an
    optimizer with weight decay changes.

    **Source:** transformers `models/gemma4/modeling_gemma4.py::Gemma4ClippableLinear`.
    """

    linear: AbstractEinsum
    bounds: Float[Array, "4"] | None
    """Lowest and highest input, lowest and highest output. None: nothing is clipped."""

    def __init__(
        self,
        eqn: str,
        shape: tuple[int, ...],
        clipping: Literal["stored"] | None,
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype,
    ):
        self.linear = Einsum(eqn, shape, key=key, dtype=dtype)
        infinite = jnp.asarray([-jnp.inf, jnp.inf, -jnp.inf, jnp.inf], dtype)
        self.bounds = None if clipping is None else infinite

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The map applied to `x`, both clipped to the stored bounds, if there are some.

        **Arguments:** `x`: with the axes of the equation's activation, after any others.

        **Returns:** the result, in the dtype of `x`.
        """
        if self.bounds is None:
            return self.linear(x)
        bounds = jax.lax.stop_gradient(self.bounds).astype(x.dtype)
        return jnp.clip(self.linear(jnp.clip(x, bounds[0], bounds[1])), bounds[2], bounds[3])
