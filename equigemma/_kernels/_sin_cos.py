"""Sines and cosines that are computed once, however many read them."""

import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float


def sin_cos(
    angles: Float[Array, "*B L R"],
) -> tuple[Float[Array, "*B L R"], Float[Array, "*B L R"]]:
    """`jnp.sin(angles), jnp.cos(angles)`.

    As a loop over halves of the last axis, or fifths: what comes out of a loop is kept, while XLA
    on CPU would compute sines again in every layer, which is a tenth of the time of a long prompt;
    seen with jax 0.10.2.
    """
    *batch, length, pairs = angles.shape
    if length == 1:
        return jnp.sin(angles), jnp.cos(angles)
    pieces = next((n for n in range(2, pairs + 1) if pairs % n == 0), 1)
    parts = jnp.moveaxis(angles.reshape(*batch, length, pieces, -1), -2, 0)
    _, (sin, cos) = jax.lax.scan(_of_part, None, parts)
    sin, cos = (jnp.moveaxis(x, 0, -2).reshape(angles.shape) for x in (sin, cos))
    return sin, cos


def _of_part(_: None, angles: Array) -> tuple[None, tuple[Array, Array]]:
    # Outside jit a loop is compiled once for each function it is given: this is always the same.
    return None, (jnp.sin(angles), jnp.cos(angles))
