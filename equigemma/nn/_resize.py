"""Bicubic resizing with antialiasing: the numbers of Pillow, as JAX operations.

Images of integers are resized in the fixed-point arithmetic of Pillow, to the same integers. Images
of floats are resized by the same weights without rounding, so that derivatives exist.
"""

import jax
import jax.numpy as jnp
import numpy as np

from equigemma._kernels import widened
from equigemma._typing import Array, Float, UInt8, typed


FRACTION_BITS = 22
"""Bits of a fixed-point weight behind the binary point: a sum of products then fits 32 bits."""


@typed
def resize_bicubic(
    images: UInt8[Array, "*B height width channels"] | Float[Array, "*B height width channels"],
    size: tuple[int, int],
) -> UInt8[Array, "*B _ _ channels"] | Float[Array, "*B _ _ channels"]:
    """Images resized to `size`, in their dtype.

    Floats are computed in float32 or wider, and may leave the range of the input near edges, which
    integers cannot.

    The width is resized first, or the height if it is to lose more than twice as many pixels. That
    is the order of Pillow 13. Older versions always begin with the width: such tall images differ,
    by up to 25 grey levels if they are noise, because integers are rounded and cut off in between.

    **Arguments:**

    - `images`: of one size.
    - `size`: height and width of the result.

    **Returns:** images of the new size.

    **Source:** Keys 1981 (cubic convolution, a = −1/2); Pillow `src/libImaging/Resample.c`.
    """
    with jax.named_scope("resize"):
        lost = [images.shape[axis] - length for axis, length in zip((-3, -2), size, strict=True)]
        passes = [(-2, size[1]), (-3, size[0])]
        if lost[0] > 0 and lost[0] > 2 * lost[1]:
            passes.reverse()
        for axis, length in passes:
            if images.shape[axis] != length:
                images = _resized_axis(images, axis, length)
        return images


def _resized_axis(images: Array, axis: int, length: int) -> Array:
    first, weights = bicubic_weights(images.shape[axis], length)
    is_integer = images.dtype == jnp.uint8
    if is_integer:
        scaled = weights * (1 << FRACTION_BITS)
        weights = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32)
    wide = images.astype(jnp.int32) if is_integer else widened(images)
    shape = [1] * images.ndim
    shape[axis] = length
    total = jnp.zeros((), wide.dtype)
    for tap in range(weights.shape[1]):
        # The weight is zero where this is past the end.
        source = np.minimum(first + tap, images.shape[axis] - 1)
        pixels = jnp.take(wide, source, axis=axis)
        weight = jnp.asarray(weights[:, tap].reshape(shape), wide.dtype)
        total = total + pixels * jnp.broadcast_to(weight, pixels.shape)
    if is_integer:
        rounded = (total + (1 << FRACTION_BITS - 1)) >> FRACTION_BITS
        return jnp.clip(rounded, 0, 255).astype(jnp.uint8)
    return total.astype(images.dtype)


def bicubic_weights(size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights that make `length` pixels of `size`.

    **Returns:** the first pixel that each new one is made of, `int[length]`, and the weights of
    this one and those after it, `float64[length, taps]`, which add up to 1.
    """
    scale = size / length
    stretch = max(scale, 1.0)
    centres = (np.arange(length) + 0.5) * scale
    first = np.maximum(np.trunc(centres - 2 * stretch + 0.5), 0).astype(np.int64)
    end = np.minimum(np.trunc(centres + 2 * stretch + 0.5), size).astype(np.int64)
    pixels = first[:, None] + np.arange((end - first).max())
    weights = _cubic((pixels - centres[:, None] + 0.5) * (1 / stretch))
    weights = np.where(pixels < end[:, None], weights, 0.0)
    weights = weights / weights.sum(axis=1, keepdims=True)
    return first, weights


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' convolution kernel with a = −1/2, which is zero from 2 on."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
