"""Local attention in chunks of queries, with relative positions as in Transformer-XL."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._kernels import widened
from equigemma._typing import Array, Bool, Float, PRNGKeyArray
from equigemma.config import ConformerConfig
from equigemma.nn._clipped import ClippedLinear
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._summary import shallow_repr, summary


class ChunkedAttention(eqx.Module):
    """Each frame attends to the last `config.window` frames, itself included.

    Queries are cut into chunks, which attend to the keys of their chunk and to those before it. A
    logit is q · k + q · r, where r is a projection of sines and cosines of the distance. Computed
    in float32 or wider.

    **Source:** Dai et al. 2019, arXiv:1901.02860, appendix B; transformers
    `models/gemma4/modeling_gemma4.py::Gemma4AudioAttention`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    query: ClippedLinear
    key: ClippedLinear
    value: ClippedLinear
    relative: AbstractEinsum
    query_scale: Float[Array, " H"]
    """A query's components are multiplied by its softplus."""
    output: ClippedLinear
    config: ConformerConfig = eqx.field(static=True)

    def __init__(self, config: ConformerConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        *keys, relative_key, output_key = jax.random.split(key, 5)
        width, shape = config.width, (config.heads, config.head_dim, config.width)
        self.query, self.key, self.value = (
            ClippedLinear("...T,NHT->...NH", shape, config.clipping, key=k, dtype=dtype)
            for k in keys
        )
        self.relative = Einsum("...T,NHT->...NH", shape, key=relative_key, dtype=dtype)
        self.query_scale = jnp.zeros(config.head_dim, dtype)
        shape = (width, config.heads, config.head_dim)
        self.output = ClippedLinear(
            "...NH,TNH->...T", shape, config.clipping, key=output_key, dtype=dtype
        )
        self.config = config

    def __call__(
        self, x: Float[Array, "B L T"], is_frame: Bool[Array, "B L"]
    ) -> Float[Array, "B L T"]:
        with jax.named_scope("attention"):
            scale = jax.nn.softplus(widened(self.query_scale)) * self._query_factor
            q = widened(self.query(x))
            q = self._chunks(q * jnp.broadcast_to(scale.astype(q.dtype), q.shape))
            k = self._contexts(widened(self.key(x)) * (math.log(1 + math.e) / math.log(2)))
            v = self._contexts(widened(self.value(x)))
            logits = jnp.einsum("bcqnh,bcknh->bcnqk", q, k, precision="highest")
            logits = self._capped(logits + self._relative_logits(q, x.dtype))
            mask = self._mask(is_frame)
            weights = jax.nn.softmax(jnp.where(mask, logits, self.config.mask_value), axis=-1)
            mixed = jnp.einsum("bcnqk,bcknh->bcqnh", weights, v, precision="highest")
            mixed = mixed.reshape(len(x), -1, *mixed.shape[3:])[:, : x.shape[1]]
            return self.output(mixed.astype(x.dtype))

    @property
    def _query_factor(self) -> float:
        return self.config.head_dim**-0.5 / math.log(2)

    def _capped(self, logits: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.config.softcap * jnp.tanh(logits / self.config.softcap)

    def _relative_logits(
        self, q: Float[Array, "B chunks Q N H"], dtype: jnp.dtype
    ) -> Float[Array, "B chunks N Q S"]:
        """q · r for the distance of each query to each key of its context."""
        distances = np.arange(self.config.context - 1, -1, -1)
        waves = jnp.asarray(sinusoids(distances, self.config.width), dtype)
        r = widened(self.relative(waves)).astype(q.dtype)
        logits = jnp.einsum("bcqnh,rnh->bcnqr", q, r, precision="highest")
        # Query i's own distances start at key i: a row that is longer by one than what it is read
        # as moves every row by one more than the row above it.
        queries, keys = logits.shape[-2], self.config.context - 1 + logits.shape[-2]
        padded = jnp.pad(logits, [(0, 0)] * 4 + [(0, keys + 1 - logits.shape[-1])])
        flat = padded.reshape(*logits.shape[:-2], -1)[..., : queries * keys]
        return flat.reshape(*logits.shape[:-2], queries, keys)

    def _mask(self, is_frame: Bool[Array, "B L"]) -> Bool[Array, "B chunks 1 Q S"]:
        """True where a query attends to a key of its context."""
        past, chunk = self.config.context - 1, self.config.chunk
        distance = np.arange(chunk)[:, None] + past - np.arange(chunk + past)
        near = jnp.asarray((distance >= 0) & (distance < self.config.window))
        return self._contexts(is_frame)[:, :, None, None, :] & near[None, None, None]

    def _chunks(self, x: Float[Array, "B L N H"]) -> Float[Array, "B chunks Q N H"]:
        chunk = self.config.chunk
        padded = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0)])
        return padded.reshape(len(x), -1, chunk, *x.shape[2:])

    def _contexts(self, x: Array) -> Array:
        """What each chunk can attend to: `context − 1` frames before it, and its own."""
        past, chunk = self.config.context - 1, self.config.chunk
        padding = [(0, 0), (past, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2)
        starts = np.arange(-(-x.shape[1] // chunk))[:, None] * chunk
        return jnp.pad(x, padding)[:, starts + np.arange(past + chunk)]


def sinusoids(distances: np.ndarray, width: int) -> np.ndarray:
    """Sines, then cosines, of distances at `width` / 2 wavelengths, in float32.

    Timescales go from 1 to 10 000 in equal ratios.
    """
    count = width // 2
    step = math.log(10_000) / max(count - 1, 1)
    scales = np.exp(np.arange(count, dtype=np.float32) * np.float32(-step))
    angles = distances[:, None].astype(np.float32) * scales
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
