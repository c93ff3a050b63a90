"""Random weights of a fresh model."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, PRNGKeyArray


BLOCK = 1 << 20
"""Numbers that are drawn at once."""


@partial(jax.jit, static_argnums=(1, 2, 3))
def random_weight(
    key: PRNGKeyArray, shape: tuple[int, ...], std: float, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """Normal numbers with this standard deviation.

    They are drawn block by block: drawing takes several times the memory of what is drawn.
    """
    *outer, width = shape
    rows = math.prod(outer)
    most = max(1, BLOCK // width)
    size = next(size for size in range(min(most, rows), 0, -1) if rows % size == 0)

    draw = partial(_normal, (size, width), std, dtype)
    if size == rows:
        return draw(key).reshape(shape)
    return jax.lax.map(draw, jax.random.split(key, rows // size)).reshape(shape)


def _normal(
    shape: tuple[int, ...], std: float, dtype: jnp.dtype, key: PRNGKeyArray
) -> Float[Array, "..."]:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)
