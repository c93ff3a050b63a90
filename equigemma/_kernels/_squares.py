"""Sums of squares, as norms need them."""

import jax.numpy as jnp

from equigemma._typing import Array, Float, Float32


def sum_of_squares(x: Float[Array, "..."]) -> Float32[Array, ""]:
    """`jnp.sum(jnp.square(x))`, in float32.

    One row at a time: XLA on CPU before 0.10 makes the squares of a whole array in memory if they
    are summed up at once, in two to three times the time (seen with 0.8.1).
    """
    rows = jnp.atleast_1d(x).astype(jnp.float32)
    return jnp.sum(jnp.einsum("...d,...d->...", rows, rows))
