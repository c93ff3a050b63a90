"""A vision transformer over patches of images of any aspect ratio, with two-dimensional RoPE.

It computes in the dtype of its input. What becomes soft tokens of its output is in
`_vision_encoder.py`.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Bool, Float, Int, PRNGKeyArray, typed
from equigemma.config import NormConfig, RopeConfig, VisionTransformerConfig
from equigemma.nn._attention import AbstractAttentionFn, DotProductAttention
from equigemma.nn._clipped import ClippedLinear
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._init import random_weight
from equigemma.nn._mask_spec import MaskSpec
from equigemma.nn._norm import RMSNorm
from equigemma.nn._patches import ImagePatches, position_embeddings
from equigemma.nn._rope import SinCos, apply_rope, rope_sin_cos
from equigemma.nn._summary import shallow_repr, summary


class AxialRotation(NamedTuple):
    """The RoPE of two axes: the first half of a head rotates by one, the second by the other."""

    column: SinCos
    row: SinCos


@typed
def axial_rotation(
    positions: Int[Array, "*B patches 2"], head_dim: int, theta: float
) -> AxialRotation:
    """The rotation of every patch by its column and row, each half of a head by itself.

    **Source:** transformers `models/gemma4/modeling_gemma4.py::Gemma4VisionRotaryEmbedding`.
    """
    config = RopeConfig(theta=theta)
    return AxialRotation(
        *(rope_sin_cos(positions[..., axis], head_dim // 2, config) for axis in (0, 1))
    )


@typed
def rotate_axially(x: Float[Array, "*B L N H"], rope: AxialRotation) -> Float[Array, "*B L N H"]:
    """Each half of every head rotated by its axis."""
    column, row = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([apply_rope(column, *rope.column), apply_rope(row, *rope.row)], axis=-1)


class VisionAttention(eqx.Module):
    """Bidirectional attention among the patches of an image.

    **Source:** transformers `models/gemma4/modeling_gemma4.py::Gemma4VisionAttention`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    query: ClippedLinear
    key: ClippedLinear
    value: ClippedLinear
    query_norm: RMSNorm
    key_norm: RMSNorm
    value_norm: RMSNorm
    attention_fn: AbstractAttentionFn
    output: ClippedLinear
    config: VisionTransformerConfig = eqx.field(static=True)

    def __init__(self, config: VisionTransformerConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        width, heads, head_dim = config.width, config.heads, config.head_dim
        *keys, output_key = jax.random.split(key, 4)
        clipping = config.clipping
        self.query, self.key, self.value = (
            ClippedLinear("...T,NHT->...NH", (heads, head_dim, width), clipping, key=k, dtype=dtype)
            for k in keys
        )
        scaled = NormConfig(epsilon=config.epsilon, offset=0.0)
        self.query_norm = RMSNorm(head_dim, scaled, dtype=dtype)
        self.key_norm = RMSNorm(head_dim, scaled, dtype=dtype)
        unscaled = NormConfig(epsilon=config.epsilon, offset=None)
        self.value_norm = RMSNorm(head_dim, unscaled, dtype=dtype)
        self.attention_fn = DotProductAttention(None)
        shape = (width, heads, head_dim)
        self.output = ClippedLinear("...NH,TNH->...T", shape, clipping, key=output_key, dtype=dtype)
        self.config = config

    def __call__(
        self, x: Float[Array, "*B L T"], rope: AxialRotation, is_patch: Bool[Array, "*B L"]
    ) -> Float[Array, "*B L T"]:
        with jax.named_scope("attention"):
            q = rotate_axially(self.query_norm(self.query(x)), rope)
            k = rotate_axially(self.key_norm(self.key(x)), rope)
            v = self.value_norm(self.value(x))
            if self.config.padding_keys == "masked":
                positions = jnp.where(is_patch, 0, -1)
                return self.output(self._attended(q, k, v, positions))
            # One more component adds 1 to the logit of every pair of patches, and no other.
            ones = jnp.broadcast_to(is_patch[..., None, None], (*q.shape[:-1], 1)).astype(q.dtype)
            q, k = (jnp.concatenate([heads, ones], axis=-1) for heads in (q, k))
            v = jnp.concatenate([v, jnp.zeros_like(ones)], axis=-1)
            mixed = self._attended(q, k, v, jnp.zeros(is_patch.shape, jnp.int32))
            return self.output(mixed[..., :-1])

    def _attended(
        self,
        q: Float[Array, "*B L N H"],
        k: Float[Array, "*B L N H"],
        v: Float[Array, "*B L N H"],
        positions: Int[Array, "*B L"],
    ) -> Float[Array, "*B L N H"]:
        k, v = jnp.swapaxes(k, -3, -2), jnp.swapaxes(v, -3, -2)
        return self.attention_fn(q, k, v, MaskSpec(positions, positions, None, "bidirectional"))


class VisionBlock(eqx.Module):
    """`x + post(attention(pre(x)))`, then the same with a gated feed-forward.

    **Source:** transformers `models/gemma4/modeling_gemma4.py::Gemma4VisionEncoderLayer`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    pre_attention_norm: RMSNorm
    attention: VisionAttention
    post_attention_norm: RMSNorm
    pre_ffw_norm: RMSNorm
    gate: ClippedLinear
    up: ClippedLinear
    down: ClippedLinear
    post_ffw_norm: RMSNorm

    def __init__(self, config: VisionTransformerConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        attention_key, gate_key, up_key, down_key = jax.random.split(key, 4)
        width, hidden, clipping = config.width, config.hidden, config.clipping
        norm = NormConfig(epsilon=config.epsilon, offset=0.0)
        self.pre_attention_norm = RMSNorm(width, norm, dtype=dtype)
        self.attention = VisionAttention(config, key=attention_key, dtype=dtype)
        self.post_attention_norm = RMSNorm(width, norm, dtype=dtype)
        self.pre_ffw_norm = RMSNorm(width, norm, dtype=dtype)
        self.gate, self.up = (
            ClippedLinear("...T,FT->...F", (hidden, width), clipping, key=k, dtype=dtype)
            for k in (gate_key, up_key)
        )
        self.down = ClippedLinear(
            "...F,TF->...T", (width, hidden), clipping, key=down_key, dtype=dtype
        )
        self.post_ffw_norm = RMSNorm(width, norm, dtype=dtype)

    def __call__(
        self, x: Float[Array, "*B L T"], rope: AxialRotation, is_patch: Bool[Array, "*B L"]
    ) -> Float[Array, "*B L T"]:
        attended = self.attention(self.pre_attention_norm(x), rope, is_patch)
        x = x + self.post_attention_norm(attended)
        with jax.named_scope("ffw"):
            normed = self.pre_ffw_norm(x)
            gated = jax.nn.gelu(self.gate(normed), approximate=True) * self.up(normed)
            return x + self.post_ffw_norm(self.down(gated))


class VisionTransformer(eqx.Module):
    """Patches with embeddings of their columns and rows, through the layers.

    **Source:** transformers `models/gemma4/modeling_gemma4.py::Gemma4VisionModel`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    patches: AbstractEinsum
    positions: Float[Array, "2 rows T"]
    """Embeddings of columns, and of rows."""
    layers: tuple[VisionBlock, ...]
    config: VisionTransformerConfig = eqx.field(static=True)

    def __init__(self, config: VisionTransformerConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        patch_key, position_key, *layer_keys = jax.random.split(key, 2 + config.layers)
        width = config.width
        shape = (width, 3 * config.patch**2)
        self.patches = Einsum("...p,Tp->...T", shape, key=patch_key, dtype=dtype)
        shape = (2, config.positions, width)
        self.positions = random_weight(position_key, shape, width**-0.5, dtype)
        self.layers = tuple(VisionBlock(config, key=one, dtype=dtype) for one in layer_keys)
        self.config = config

    @typed
    def __call__(self, patches: ImagePatches) -> Float[Array, "*B patches T"]:
        """One vector for each patch; those of padding mean nothing.

        **Arguments:** `patches`: pixel values and positions, padded.

        **Returns:** hidden states of the last layer.
        """
        values, positions = patches.pixel_values, patches.positions
        embedded = self.patches(2 * (values - 0.5))
        x = embedded + position_embeddings(self.positions, positions).astype(embedded.dtype)
        rope = axial_rotation(positions, self.config.head_dim, self.config.rope_theta)
        is_patch = patches.is_patch
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"vision_layer_{index}"):
                x = layer(x, rope, is_patch)
        return x
