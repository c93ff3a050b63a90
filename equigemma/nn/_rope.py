"""Rotary position embedding: angles from positions, then a rotation of each head.

No tables are kept: positions go in, sines and cosines come out, once per forward pass.
"""

from typing import NamedTuple

import jax.numpy as jnp

from equigemma._kernels import sin_cos, widened
from equigemma._typing import Array, Float, Int, typed
from equigemma.config import RopeConfig


class SinCos(NamedTuple):
    """Sine and cosine of every angle, in float32: bfloat16 angles collide past position 256."""

    sin: Float[Array, "*B L R"]
    cos: Float[Array, "*B L R"]


@typed
def rope_sin_cos(positions: Int[Array, "*B L"], head_dim: int, config: RopeConfig) -> SinCos:
    """The rotation of every position: angle i is p / scale · theta^(−2i / H).

    With `proportion` below 1 only the first share of the pairs turns; the others keep angle 0.

    **Arguments:**

    - `positions`: absolute.
    - `head_dim`: H, an even number.
    - `config`: base, scale and proportion of the rotation.

    **Returns:** sine and cosine, float32 `[*B L H/2]` each.

    **Source:** Su et al. 2021, arXiv:2104.09864; gemma `gm/math/_positional_embeddings.py`.
    """
    turning = int(config.proportion * head_dim // 2)
    exponents = (2.0 / head_dim) * jnp.arange(turning, dtype=jnp.float32)
    wavelengths = jnp.pad(
        config.theta**exponents, (0, head_dim // 2 - turning), constant_values=jnp.inf
    )
    # Dividing in this order gives the reference's angles to the last bit, also at position 100k.
    wavelengths = jnp.broadcast_to(wavelengths, (*positions.shape, head_dim // 2))
    angles = positions.astype(jnp.float32)[..., None] / wavelengths / config.scale
    return SinCos(*sin_cos(angles))


@typed
def apply_rope(
    x: Float[Array, "*B L N H"], sin: Float[Array, "*B L R"], cos: Float[Array, "*B L R"]
) -> Float[Array, "*B L N H"]:
    """Turns pair (i, i + H/2) of every head by its angle; in float32 or wider, cast back.

    **Arguments:**

    - `x`: queries or keys.
    - `sin`, `cos`: what `rope_sin_cos` returns, R being H/2.

    **Returns:** `x` rotated, in its dtype.
    """
    wide = widened(x)
    first, second = jnp.split(wide, 2, axis=-1)
    sin, cos = (part.astype(wide.dtype)[..., None, :] for part in (sin, cos))
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
