"""Images of any size as patches that fill a token budget.

An image is resized so that, in its own aspect ratio, it has as many patches as its budget allows.
So all images with one budget have arrays of one shape, whatever their sizes, and one compiled
program: what an image has less is padding, with the position −1.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._kernels import widened
from equigemma._typing import Array, Bool, Float, Int, UInt8, typed
from equigemma.config import PatchConfig, VisionTransformerConfig
from equigemma.nn._resize import resize_bicubic


PADDING_POSITION = -1
COLOURS = np.arange(256, dtype=np.float32) / np.float32(255)
"""The float of every 8-bit colour."""


class ImagePatches(eqx.Module):
    """Patches of images, and where in its image each of them is.

    transformers calls the two `pixel_values` and `image_position_ids`.
    """

    pixel_values: Float[Array, "*B patches pixels"]
    """Colours from 0 to 1: rows of a patch, its columns, then channels."""
    positions: Int[Array, "*B patches 2"]
    """Column and row of each patch; −1 and −1 for padding, which comes last."""

    @property
    def is_patch(self) -> Bool[Array, "*B patches"]:
        """False for padding."""
        return self.positions[..., 0] != PADDING_POSITION

    @typed
    def num_soft_tokens(self, pooling: int) -> Int[Array, "*B"]:
        """Soft tokens of each image, `pooling`² patches each."""
        return self.is_patch.sum(axis=-1, dtype=jnp.int32) // pooling**2


def soft_token_grid(height: int, width: int, side: int, max_soft_tokens: int) -> tuple[int, int]:
    """Rows and columns of the soft tokens of an image.

    ```python
    >>> from equigemma.nn import soft_token_grid
    >>> soft_token_grid(480, 640, side=48, max_soft_tokens=280)  # is resized to 672 x 912 pixels
    (14, 19)

    ```

    **Arguments:**

    - `height`, `width`: of the image, in pixels.
    - `side`: pixels of each side of a soft token.
    - `max_soft_tokens`: the token budget.

    **Returns:** rows and columns, whose product is at most the budget.

    **Raises:** `ValueError` for an image without pixels, or a budget without tokens.

    **Source:** transformers `models/gemma4/image_processing_pil_gemma4.py`.
    """
    if height < 1 or width < 1:
        raise ValueError(f"An image needs at least one pixel, got {height} x {width}.")
    if max_soft_tokens < 1:
        raise ValueError(f"An image needs at least one soft token, got {max_soft_tokens}.")
    factor = math.sqrt(max_soft_tokens * side**2 / (height * width))
    rows, columns = (math.floor(factor * length / side) for length in (height, width))
    # A very long image is a single row or column of soft tokens, as far as the budget goes.
    if rows == 0:
        return 1, min(max(width // height, 1), max_soft_tokens)
    if columns == 0:
        return min(height // width, max_soft_tokens), 1
    return rows, columns


def token_budget(
    config: VisionTransformerConfig | PatchConfig, max_soft_tokens: int | None = None
) -> int:
    """The token budget of an image: `max_soft_tokens`, or by default that of the config.

    **Arguments:**

    - `config`: that of the vision encoder.
    - `max_soft_tokens`: what was asked for; None: nothing.

    **Returns:** a number of soft tokens.

    **Raises:** `ValueError` for a budget that the model was not trained with.
    """
    if max_soft_tokens is None:
        return config.max_soft_tokens
    if max_soft_tokens not in config.budgets:
        raise ValueError(
            f"max_soft_tokens must be one of {config.budgets}, the token budgets that the model "
            f"was trained with; got {max_soft_tokens}."
        )
    return max_soft_tokens


@typed
def image_patches(
    images: UInt8[Array, "*B height width 3"] | Float[Array, "*B height width 3"],
    config: VisionTransformerConfig | PatchConfig,
    max_soft_tokens: int | None = None,
) -> ImagePatches:
    """Patches of images of one size, on the device: a program of its own for each size.

    **Arguments:**

    - `images`: integers from 0 to 255 become what Pillow makes of them; floats from 0 to 1 are
      resized without rounding, and have derivatives.
    - `config`: that of the vision encoder, `model.config.vision`.
    - `max_soft_tokens`: the token budget, by default that of the config.

    **Returns:** patches, padded to the budget, in the dtype of floats, or in float32.

    **Raises:** `ValueError` for images without pixels, and for a budget that the model was not
    trained with.
    """
    budget = token_budget(config, max_soft_tokens)
    height, width = images.shape[-3:-1]
    grid = soft_token_grid(height, width, config.side, budget)
    resized = resize_bicubic(images, (grid[0] * config.side, grid[1] * config.side))
    if resized.dtype == jnp.uint8:
        # A table: a compiled division by 255 multiplies by 1/255, which rounds differently.
        resized = jnp.asarray(COLOURS)[resized.astype(jnp.int32)]
    values = patchify(resized, config.patch)
    missing = budget * config.pooling**2 - values.shape[-2]
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, missing), (0, 0)])
    positions = jnp.asarray(patch_positions(grid, config.pooling, budget))
    return ImagePatches(values, jnp.broadcast_to(positions, (*values.shape[:-1], 2)))


@typed
def patchify(
    images: Float[Array, "*B height width channels"], patch: int
) -> Float[Array, "*B patches pixels"]:
    """Images cut into squares of `patch` pixels on each side, row by row."""
    *batch, height, width, channels = images.shape
    rows, columns = height // patch, width // patch
    grid = images.reshape(*batch, rows, patch, columns, patch, channels)
    return jnp.swapaxes(grid, -4, -3).reshape(*batch, rows * columns, patch**2 * channels)


def patch_positions(grid: tuple[int, int], pooling: int, max_soft_tokens: int) -> np.ndarray:
    """Column and row of every patch, `int32[patches 2]`, padded to the budget with −1.

    **Arguments:**

    - `grid`: rows and columns of soft tokens, of `pooling`² patches each.
    - `max_soft_tokens`: the token budget.

    **Returns:** `int32[patches 2]`, column before row, patches row by row.
    """
    rows, columns = (length * pooling for length in grid)
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    positions = np.full((max_soft_tokens * pooling**2, 2), PADDING_POSITION, np.int32)
    positions[: rows * columns] = np.stack([column, row], axis=-1)
    return positions


@typed
def position_embeddings(
    table: Float[Array, "2 rows T"], positions: Int[Array, "*B patches 2"]
) -> Float[Array, "*B patches T"]:
    """The sum of the embeddings of a patch's column and row, in float32 or wider; 0 for padding.

    Positions outside of the table give NaN.
    """
    wide, index = widened(table), jnp.maximum(positions, 0)
    column, row = (
        wide[axis].at[index[..., axis]].get(mode="fill", fill_value=jnp.nan) for axis in (0, 1)
    )
    is_patch = positions[..., :1] != PADDING_POSITION
    return jnp.where(is_patch, column + row, jnp.zeros((), wide.dtype))


@typed
def pool_by_position(
    x: Float[Array, "*B patches T"], positions: Int[Array, "*B patches 2"], pooling: int
) -> Float[Array, "*B _ T"]:
    """Means over squares of `pooling` patches on each side, in float32 or wider.

    **Returns:** one vector for each `pooling`² patches, row by row; 0 where there is only padding.

    **Raises:** `ValueError` if the number of patches is not a multiple of `pooling`².
    """
    count, rest = divmod(x.shape[-2], pooling**2)
    if rest:
        raise ValueError(
            f"The number of patches must be a multiple of {pooling**2}, which make a soft token; "
            f"got {x.shape[-2]}."
        )
    columns = (positions[..., 0].max(axis=-1, keepdims=True) + 1) // pooling
    cell = positions // pooling
    is_patch = positions[..., 0] != PADDING_POSITION
    # What has the number `count` is dropped.
    index = jnp.where(is_patch, cell[..., 0] + columns * cell[..., 1], count)
    flat, cells = widened(x).reshape(-1, *x.shape[-2:]), index.reshape(-1, x.shape[-2])
    summed = jax.vmap(lambda rows, cell: jax.ops.segment_sum(rows, cell, count))(flat, cells)
    return summed.reshape(*x.shape[:-2], count, x.shape[-1]) / pooling**2
