"""Patches to soft tokens: a vision transformer, pooling, and the projection to the text's width."""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, PRNGKeyArray, typed
from equigemma.config import NormConfig, VisionTransformerConfig
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._norm import RMSNorm
from equigemma.nn._patches import ImagePatches, pool_by_position
from equigemma.nn._summary import shallow_repr, summary
from equigemma.nn._vision_transformer import VisionTransformer


class Standardize(eqx.Module):
    """`(x − bias) · scale`, both of them stored by the checkpoint, like bounds: not trained."""

    bias: Float[Array, " T"]
    scale: Float[Array, " T"]

    def __init__(self, width: int, *, dtype: jnp.dtype):
        self.bias = jnp.zeros(width, dtype)
        self.scale = jnp.ones(width, dtype)

    def __call__(self, x: Float[Array, "*B T"]) -> Float[Array, "*B T"]:
        bias, scale = (
            jnp.broadcast_to(jax.lax.stop_gradient(leaf).astype(x.dtype), x.shape)
            for leaf in (self.bias, self.scale)
        )
        return (x - bias) * scale


class VisionEncoder(eqx.Module):
    """The vision encoder and its projection: soft tokens that stand among the tokens of a text.

    **Source:** transformers `models/gemma4/modeling_gemma4.py::Gemma4VisionModel`,
    `Gemma4MultimodalEmbedder`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    tower: VisionTransformer
    standardize: Standardize | None
    norm: RMSNorm
    projection: AbstractEinsum

    def __init__(
        self,
        width: int,
        config: VisionTransformerConfig,
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype | type = jnp.float32,
    ):
        dtype = jnp.dtype(dtype)
        tower_key, projection_key = jax.random.split(key)
        self.tower = VisionTransformer(config, key=tower_key, dtype=dtype)
        self.standardize = None
        if config.standardize is not None:
            self.standardize = Standardize(config.width, dtype=dtype)
        norm = NormConfig(epsilon=config.epsilon, offset=None)
        self.norm = RMSNorm(config.width, norm, dtype=dtype)
        shape = (width, config.width)
        self.projection = Einsum("...T,DT->...D", shape, key=projection_key, dtype=dtype)

    @property
    def config(self) -> VisionTransformerConfig:
        """That of the vision transformer."""
        return self.tower.config

    @typed
    def __call__(self, patches: ImagePatches) -> Float[Array, "*B M D"]:
        """The soft tokens of each image, row by row, in the dtype of its pixel values.

        **Arguments:** `patches`: pixel values and positions, padded.

        **Returns:** as many for each image as its budget; after the last of an image, zeros.

        **Raises:** `ValueError` if the number of patches is not a multiple of `pooling`².
        """
        with jax.named_scope("vision"):
            pooling = self.config.pooling
            pooled = pool_by_position(self.tower(patches), patches.positions, pooling)
            # Multiplied by the root of the width they may leave the range of float16.
            pooled = pooled * self.config.width**0.5
            if self.standardize is not None:
                pooled = self.standardize(pooled)
            soft = self.projection(self.norm(pooled.astype(patches.pixel_values.dtype)))
            steps = jnp.arange(soft.shape[-2], dtype=jnp.int32)
            number = patches.num_soft_tokens(pooling)[..., None]
            exists = jnp.broadcast_to(steps, soft.shape[:-1]) < number
            return jnp.where(exists[..., None], soft, jnp.zeros((), soft.dtype))
