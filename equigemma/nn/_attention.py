"""Grouped-query attention: projections, norms, rotation, and the product of it all.

Which keys a query may see is decided in `_mask.py`, what is remembered in `_cache.py`.
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Bool, Float, Int, PRNGKeyArray, typed
from equigemma.config import AttentionConfig, KeyIsValue, OwnKV
from equigemma.nn._cache import AbstractKVCache, Keys
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._mask import sliding, visible
from equigemma.nn._norm import RMSNorm, normed, optional_norm
from equigemma.nn._rope import Rotation, rotate


HIDDEN = -2.3819763e38
"""Logit of a key that may not be seen: finite, so that a query that sees nothing gives no NaN."""


class Queries(eqx.Module):
    """What all layers share about the tokens of one call: where they are, and what they may see.

    `mask`, if given, replaces the causal rule; windows are applied on top of it. `block_end` is the
    position where the image ends that a token is part of, else its own.
    """

    positions: Int[Array, "*B L"]
    length: Int[Array, "*B"]
    mask: Bool[Array, "*B L S"] | None
    block_end: Int[Array, "*B L"] | None = None

    def may_see(
        self, k_positions: Int[Array, "*B S"], config: AttentionConfig
    ) -> Bool[Array, "*B L S"]:
        """The mask of a layer whose keys are at `k_positions`."""
        window = config.window
        if self.mask is None:
            return visible(self.positions, k_positions, window, config.visibility, self.block_end)
        if window is None:
            return self.mask
        return self.mask & sliding(self.positions, k_positions, window)


@typed
def attention_weights(
    q: Float[Array, "*B L N H"],
    k: Float[Array, "*B K S H"],
    mask: Bool[Array, "*B L S"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*B K G L S"]:
    """How much each query head looks at each key, in float32.

    A query that may see nothing looks at all keys alike.

    **Arguments:** `q`: already scaled. `softcap`: logits become c·tanh(logits / c) before the mask.
    """
    grouped = q.reshape(*q.shape[:-2], k.shape[-3], -1, q.shape[-1])
    logits = jnp.einsum(
        "...LKGH,...KSH->...KGLS", grouped, k.astype(q.dtype), preferred_element_type=jnp.float32
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[..., None, None, :, :], logits, HIDDEN)
    return jax.nn.softmax(logits, axis=-1)


@typed
def attend(
    q: Float[Array, "*B L N H"],
    k: Float[Array, "*B K S H"],
    v: Float[Array, "*B K S H"],
    mask: Bool[Array, "*B L S"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*B L N H"]:
    """Softmax attention of N query heads over K key/value heads, K a divisor of N.

    Logits and softmax are float32, see `attention_weights`; the result has the dtype of `q`.

    **Source:** Ainslie et al. 2023, arXiv:2305.13245; gemma `gm/nn/_modules.py::Attention`.
    """
    weights = attention_weights(q, k, mask, softcap=softcap).astype(q.dtype)
    mixed = jnp.einsum(
        "...KGLS,...KSH->...KGLH", weights, v.astype(q.dtype), preferred_element_type=jnp.float32
    )
    # A step of its own: on CPU, XLA has no bfloat16 product with a float32 result in this order.
    return jnp.einsum("...KGLH->...LKGH", mixed).reshape(q.shape).astype(q.dtype)


class AbstractAttend(eqx.Module):
    """How queries, keys and values mix. Another way to compute it takes this place in the tree."""

    softcap: eqx.AbstractVar[float | None]

    @abstractmethod
    def __call__(
        self,
        q: Float[Array, "*B L N H"],
        k: Float[Array, "*B K S H"],
        v: Float[Array, "*B K S H"],
        mask: Bool[Array, "*B L S"],
    ) -> Float[Array, "*B L N H"]: ...


class Attend(AbstractAttend):
    """`attend`, every logit computed."""

    softcap: float | None = eqx.field(static=True)

    def __call__(self, q, k, v, mask):
        return attend(q, k, v, mask, softcap=self.softcap)


class AbstractProjection(eqx.Module):
    """Activations to queries, keys and values."""

    @abstractmethod
    def __call__(
        self, x: Float[Array, "*B L D"]
    ) -> tuple[Float[Array, "*B L N H"], Float[Array, "*B L K H"], Float[Array, "*B L K H"]]: ...


class SplitProjection(AbstractProjection):
    """Queries from one weight, keys and values from another."""

    q: AbstractEinsum
    kv: AbstractEinsum

    def __init__(self, width: int, config: AttentionConfig, *, key, dtype):
        assert isinstance(config.kv, OwnKV)
        q_key, kv_key = jax.random.split(key)
        self.q = _query_einsum(width, config, key=q_key, dtype=dtype)
        self.kv = Einsum(
            "...D,CKDH->...CKH",
            (2, config.kv.heads, width, config.head_dim),
            key=kv_key,
            dtype=dtype,
        )

    def __call__(self, x):
        kv = self.kv(x)
        return self.q(x), kv[..., 0, :, :], kv[..., 1, :, :]


class KeyIsValueProjection(AbstractProjection):
    """Queries from one weight, and from another what are keys and values both."""

    q: AbstractEinsum
    k: AbstractEinsum

    def __init__(self, width: int, config: AttentionConfig, *, key, dtype):
        assert isinstance(config.kv, KeyIsValue)
        q_key, k_key = jax.random.split(key)
        self.q = _query_einsum(width, config, key=q_key, dtype=dtype)
        shape = (config.kv.heads, width, config.head_dim)
        self.k = Einsum("...D,KDH->...KH", shape, key=k_key, dtype=dtype)

    def __call__(self, x):
        k = self.k(x)
        return self.q(x), k, k


class StackedProjection(AbstractProjection):
    """Queries, keys and values from one weight: as many key/value heads as query heads."""

    qkv: AbstractEinsum

    def __init__(self, width: int, config: AttentionConfig, *, key, dtype):
        shape = (3, config.heads, width, config.head_dim)
        self.qkv = Einsum("...D,CNDH->...CNH", shape, key=key, dtype=dtype)

    def __call__(self, x):
        qkv = self.qkv(x)
        return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]


def _query_einsum(width: int, config: AttentionConfig, *, key, dtype) -> Einsum:
    shape = (config.heads, width, config.head_dim)
    return Einsum("...D,NDH->...NH", shape, key=key, dtype=dtype)


def _projection(width: int, config: AttentionConfig, *, key, dtype) -> AbstractProjection:
    if isinstance(config.kv, KeyIsValue):
        return KeyIsValueProjection(width, config, key=key, dtype=dtype)
    stored = {"NDH,CKDH": SplitProjection, "CNDH": StackedProjection}[config.qkv_axes]
    return stored(width, config, key=key, dtype=dtype)


class Attention(eqx.Module):
    """An attention layer with keys and values of its own."""

    projection: AbstractProjection
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    value_norm: RMSNorm | None
    attend: AbstractAttend
    output: AbstractEinsum
    config: AttentionConfig = eqx.field(static=True)

    def __init__(self, width: int, config: AttentionConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        in_key, out_key = jax.random.split(key)
        self.projection = _projection(width, config, key=in_key, dtype=dtype)
        self.query_norm = optional_norm(config.head_dim, config.qk_norm, dtype=dtype)
        self.key_norm = optional_norm(config.head_dim, config.qk_norm, dtype=dtype)
        self.value_norm = optional_norm(config.head_dim, config.v_norm, dtype=dtype)
        self.attend = Attend(config.softcap)
        self.output = Einsum(
            "...NH,NHD->...D", (config.heads, config.head_dim, width), key=out_key, dtype=dtype
        )
        self.config = config

    @typed
    def __call__(
        self,
        x: Float[Array, "*B L D"],
        queries: Queries,
        turn: Rotation,
        cache: AbstractKVCache | None = None,
    ) -> tuple[Float[Array, "*B L D"], AbstractKVCache | None]:
        """Attends from `x` to itself and to what `cache` remembers; returns the new memory too."""
        with jax.named_scope("attention"):
            q, k, v = self.projection(x)
            v = normed(self.value_norm, v)
            q = rotate(normed(self.query_norm, q), *turn)
            q = q * jnp.asarray(self.config.query_scale, q.dtype)
            k = rotate(normed(self.key_norm, k), *turn)

            keys = Keys(jnp.swapaxes(k, -3, -2), jnp.swapaxes(v, -3, -2), queries.positions)
            if cache is not None:
                keys, cache = cache.extend(keys, queries.length, self.config.window)
            mask = queries.may_see(keys.positions, self.config)
            return self.output(self.attend(q, keys.k, keys.v, mask)), cache
