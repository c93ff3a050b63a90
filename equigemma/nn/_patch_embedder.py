"""Raw patches as soft tokens, without an encoder."""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, PRNGKeyArray, typed
from equigemma.config import NormConfig, PatchConfig
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._init import random_weight
from equigemma.nn._norm import LayerNorm, RMSNorm
from equigemma.nn._patches import ImagePatches, position_embeddings
from equigemma.nn._siglip import Affine


class PatchEmbedder(eqx.Module):
    """Pixel values of a patch, normalised and projected, plus embeddings of its column and row.

    **Source:** transformers `models/gemma4_unified/modeling_gemma4_unified.py`,
    `Gemma4UnifiedVisionEmbedder`.
    """

    patch_norm: LayerNorm
    patches: Affine
    embedding_norm: LayerNorm
    positions: Float[Array, "2 rows T"]
    """Embeddings of columns, and of rows."""
    position_norm: LayerNorm
    norm: RMSNorm
    projection: AbstractEinsum
    config: PatchConfig = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        config: PatchConfig,
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype | type = jnp.float32,
    ):
        dtype = jnp.dtype(dtype)
        patch_key, position_key, projection_key = jax.random.split(key, 3)
        inner, pixels = config.width, 3 * config.patch**2
        epsilon = config.layer_norm_epsilon
        self.patch_norm = LayerNorm(pixels, epsilon, dtype=dtype)
        self.patches = Affine("...p,Tp->...T", (inner, pixels), key=patch_key, dtype=dtype)
        self.embedding_norm = LayerNorm(inner, epsilon, dtype=dtype)
        shape = (2, config.positions, inner)
        self.positions = random_weight(position_key, shape, inner**-0.5, dtype)
        self.position_norm = LayerNorm(inner, epsilon, dtype=dtype)
        self.norm = RMSNorm(inner, NormConfig(epsilon=config.epsilon, offset=None), dtype=dtype)
        self.projection = Einsum("...T,DT->...D", (width, inner), key=projection_key, dtype=dtype)
        self.config = config

    @typed
    def __call__(self, patches: ImagePatches) -> Float[Array, "*B M D"]:
        """One soft token for each patch, in the dtype of its pixel values; zeros for padding.

        **Arguments:** `patches`: pixel values and positions, padded.

        **Returns:** soft tokens.
        """
        with jax.named_scope("vision"):
            embedded = self.embedding_norm(self.patches(self.patch_norm(patches.pixel_values)))
            places = position_embeddings(self.positions, patches.positions)
            x = self.position_norm(embedded + places.astype(embedded.dtype))
            soft = self.projection(self.norm(x))
            return jnp.where(patches.is_patch[..., None], soft, jnp.zeros((), soft.dtype))
