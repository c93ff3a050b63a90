"""The tower that turns an image into vectors, one for each patch of it.

It computes in float32 whatever the dtype of its weights, as it was trained. How its vectors get
into a text is decided in `_vision.py`.
"""

from math import gcd

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import attention, result_axes, weight_axes
from equigemma._typing import Array, Float, Float32, PRNGKeyArray, typed
from equigemma.config import SigLIPConfig
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._norm import LayerNorm
from equigemma.nn._summary import shallow_repr, summary


QUERIES = 1024
"""Queries computed at once, each over all patches: bounds the memory of the logits."""


class Affine(eqx.Module):
    """A linear map and a bias."""

    linear: AbstractEinsum
    bias: Float[Array, "..."]

    def __init__(self, eqn: str, shape: tuple[int, ...], *, key: PRNGKeyArray, dtype: jnp.dtype):
        sizes = dict(zip(weight_axes(eqn), shape, strict=True))
        self.linear = Einsum(eqn, shape, key=key, dtype=dtype)
        self.bias = jnp.zeros([sizes[axis] for axis in result_axes(eqn)], dtype)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = self.linear(x)
        return y + jnp.broadcast_to(self.bias.astype(y.dtype), y.shape)


class PatchAttention(eqx.Module):
    """Every patch attends to every patch; as many key/value heads as query heads, no rotation."""

    __pdoc__ = summary
    __repr__ = shallow_repr

    query: Affine
    key: Affine
    value: Affine
    output: Affine

    def __init__(self, config: SigLIPConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        width, heads = config.width, config.heads
        keys, head_dim = jax.random.split(key, 4), width // heads
        self.query, self.key, self.value = (
            Affine("...T,TNH->...NH", (width, heads, head_dim), key=one, dtype=dtype)
            for one in keys[:3]
        )
        shape = (heads, head_dim, width)
        self.output = Affine("...NH,NHT->...T", shape, key=keys[3], dtype=dtype)

    def __call__(self, x: Float[Array, "*B L T"]) -> Float[Array, "*B L T"]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        q = q * q.shape[-1] ** -0.5
        k, v = jnp.swapaxes(k, -3, -2), jnp.swapaxes(v, -3, -2)
        length, rank = x.shape[-2], x.ndim
        size = gcd(length, QUERIES) if length > QUERIES else length

        def look(q: Array):
            return attention(q, k, v, jnp.ones((*q.shape[:-2], length), bool))

        if size == length:
            return self.output(look(q))
        groups = q.reshape(*x.shape[:-2], -1, size, *q.shape[-2:])
        mixed = jax.lax.map(look, jnp.moveaxis(groups, rank - 2, 0))
        return self.output(jnp.moveaxis(mixed, 0, rank - 2).reshape(q.shape))


class PatchLayer(eqx.Module):
    """`x + attention(norm(x))`, then the same with a feed-forward without a gate."""

    __pdoc__ = summary
    __repr__ = shallow_repr

    attention_norm: LayerNorm
    attention: PatchAttention
    ffw_norm: LayerNorm
    up: Affine
    down: Affine

    def __init__(self, config: SigLIPConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        attention_key, up_key, down_key = jax.random.split(key, 3)
        width, hidden = config.width, config.hidden
        self.attention_norm = LayerNorm(width, config.epsilon, dtype=dtype)
        self.attention = PatchAttention(config, key=attention_key, dtype=dtype)
        self.ffw_norm = LayerNorm(width, config.epsilon, dtype=dtype)
        self.up = Affine("...T,TF->...F", (width, hidden), key=up_key, dtype=dtype)
        self.down = Affine("...F,FT->...T", (hidden, width), key=down_key, dtype=dtype)

    def __call__(self, x: Float[Array, "*B L T"]) -> Float[Array, "*B L T"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.ffw_norm(x)), approximate=True))


class SigLIP(eqx.Module):
    """Patches, each with an embedding of its place, through the layers.

    **Source:** gemma `gm/nn/vision/_vision_utils.py::ViTModel`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    patches: Affine
    positions: Float[Array, "1 L T"]
    layers: tuple[PatchLayer, ...]
    final_norm: LayerNorm
    config: SigLIPConfig = eqx.field(static=True)

    def __init__(self, config: SigLIPConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        patch_key, position_key, *layer_keys = jax.random.split(key, 2 + config.layers)
        patch, width = config.patch, config.width
        shape = (patch, patch, 3, width)
        self.patches = Affine("...YZC,YZCT->...T", shape, key=patch_key, dtype=dtype)
        scale = jnp.asarray(width**-0.5, dtype)
        self.positions = jax.random.normal(position_key, (1, config.side**2, width), dtype) * scale
        self.layers = tuple(PatchLayer(config, key=one, dtype=dtype) for one in layer_keys)
        self.final_norm = LayerNorm(width, config.epsilon, dtype=dtype)
        self.config = config

    @typed
    def __call__(self, pixels: Float32[Array, "*B height width 3"]) -> Float32[Array, "*B L T"]:
        """One vector for each patch, row by row.

        **Arguments:** `pixels`: colours from −1 to 1, `config.pixels` on each side.

        **Returns:** float32 vectors, `config.side`² of them for each image, after the last norm.
        """
        side, patch = self.config.side, self.config.patch
        batch = pixels.shape[:-3]
        grid = pixels.reshape(*batch, side, patch, side, patch, 3)
        x = self.patches(jnp.swapaxes(grid, -4, -3).reshape(*batch, side**2, patch, patch, 3))
        x = x + jnp.broadcast_to(self.positions[0].astype(x.dtype), x.shape)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"patch_layer_{index}"):
                x = layer(x)
        return self.final_norm(x)
