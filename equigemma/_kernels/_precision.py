"""The dtype to compute in: float32, or float64 where the input is."""

import jax.numpy as jnp

from equigemma._typing import Array, Float


def wide_dtype(x: Float[Array, "..."]) -> jnp.dtype:
    """The dtype of statistics, sums and functions of `x`: at least float32.

    Half precision is too coarse for them, and a model of float64, which derivatives are checked
    with, stays in float64 throughout.
    """
    return x.dtype if x.dtype.itemsize > 4 else jnp.dtype(jnp.float32)


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` in its `wide_dtype`."""
    return x.astype(wide_dtype(x))
