"""Grouped-query attention: projections, norms, rotation, and the product of it all.

The masks are computed in `_mask.py`, the KV cache is in `_cache.py`.
"""

from abc import abstractmethod
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import MASK_VALUE as MASK_VALUE
from equigemma._kernels import attention, blockwise_attention, wide_dtype
from equigemma._typing import Array, Bool, Float, Int, PRNGKeyArray, typed
from equigemma.config import AttentionConfig, KeyIsValueConfig, OwnKVConfig
from equigemma.nn._cache import AbstractKVCache, KeysValues
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._mask_spec import MaskSpec
from equigemma.nn._norm import RMSNorm, normed, optional_norm
from equigemma.nn._rope import SinCos, apply_rope
from equigemma.nn._summary import shallow_repr, summary


class SequenceInfo(eqx.Module):
    """Positions and mask of the tokens of one call, which all layers share.

    `mask`, if given, replaces the causal rule; windows are applied on top of it. Its columns are
    those of the keys, or one for each position (see `KeysValues.columns`). `block_end` is the
    position where the image ends that a token is part of, else its own. `segment_ids` numbers the
    texts of a row, which do not attend to each other. `contiguous`: each token of a text is one
    position after the one before it.
    """

    positions: Int[Array, "*B L"]
    length: Int[Array, "*B"]
    mask: Bool[Array, "*B L S"] | None
    block_end: Int[Array, "*B L"] | None = None
    segment_ids: Int[Array, "*B L"] | None = None
    contiguous: bool = eqx.field(static=True, default=False)

    def keys(self, k: Float[Array, "*B K L H"], v: Float[Array, "*B K L H"]) -> KeysValues:
        """Keys and values of the same tokens, with their positions."""
        return KeysValues(k, v, self.positions, "aligned" if self.contiguous else None)

    def mask_spec(self, keys: KeysValues, config: AttentionConfig) -> MaskSpec:
        """The mask of one layer over `keys`."""
        return MaskSpec(
            q_pos=self.positions,
            k_pos=keys.positions,
            window=config.window,
            mask_kind=config.mask_kind,
            explicit_mask=None if self.mask is None else keys.columns(self.mask),
            block_end=self.block_end,
            segment_ids=None if self.segment_ids is None else (self.segment_ids, self.segment_ids),
            key_layout=keys.key_layout,
        )


@typed
def attention_weights(
    q: Float[Array, "*B L N H"],
    k: Float[Array, "*B K S H"],
    mask: Bool[Array, "*B L S"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*B K G L S"]:
    """Attention weights of each query head, after the softmax, in float32 or wider.

    A query that attends to nothing has the same weight for all keys.

    **Arguments:**

    - `q`: already scaled.
    - `k`: keys.
    - `mask`: True where a query attends to a key.
    - `softcap`: logits become c·tanh(logits / c) before the mask.

    **Returns:** weights of the keys, which add up to 1; the query heads are grouped by their
    key/value head, G of them for each.
    """
    grouped = q.reshape(*q.shape[:-2], k.shape[-3], -1, q.shape[-1])
    logits = jnp.einsum(
        "...LKGH,...KSH->...KGLS", grouped, k.astype(q.dtype), preferred_element_type=wide_dtype(q)
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[..., None, None, :, :], logits, MASK_VALUE)
    return jax.nn.softmax(logits, axis=-1)


@typed
def dot_product_attention(
    q: Float[Array, "*B L N H"],
    k: Float[Array, "*B K S H"],
    v: Float[Array, "*B K S H"],
    mask: Bool[Array, "*B L S"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*B L N H"]:
    """Softmax attention of N query heads over K key/value heads, K a divisor of N.

    Logits and softmax are float32 or wider. A query that attends to nothing has the mean of all
    values.

    **Arguments:**

    - `q`: already scaled.
    - `k`, `v`: keys and values.
    - `mask`: True where a query attends to a key.
    - `softcap`: logits become c·tanh(logits / c) before the mask.

    **Returns:** the mixed values of each query head, in the dtype of `q`.

    **Source:** Ainslie et al. 2023, arXiv:2305.13245; gemma `gm/nn/_modules.py::Attention`.
    """
    weights, values = attention_weights(q, k, mask, softcap=softcap), v.astype(q.dtype)
    mixed = jnp.einsum(
        "...KGLS,...KSH->...LKGH",
        weights.astype(q.dtype),
        values,
        preferred_element_type=wide_dtype(q),
    )
    return mixed.reshape(q.shape).astype(q.dtype)


class AbstractAttentionFn(eqx.Module):
    """An attention function: queries, keys and values to outputs. Other kernels subclass it."""

    softcap: eqx.AbstractVar[float | None]

    @abstractmethod
    def __call__(
        self,
        q: Float[Array, "*B L N H"],
        k: Float[Array, "*B K S H"],
        v: Float[Array, "*B K S H"],
        mask_spec: MaskSpec,
    ) -> Float[Array, "*B L N H"]: ...


class DotProductAttention(AbstractAttentionFn):
    """`dot_product_attention` as a kernel, without the keys that no query attends to."""

    softcap: float | None = eqx.field(static=True)

    def __call__(
        self,
        q: Float[Array, "*B L N H"],
        k: Float[Array, "*B K S H"],
        v: Float[Array, "*B K S H"],
        mask_spec: MaskSpec,
    ):
        return blockwise_attention(partial(attention, softcap=self.softcap), q, k, v, mask_spec)


class AbstractProjection(eqx.Module):
    """Activations to queries, keys and values."""

    __pdoc__ = summary
    __repr__ = shallow_repr

    @abstractmethod
    def __call__(
        self, x: Float[Array, "*B L D"]
    ) -> tuple[Float[Array, "*B L N H"], Float[Array, "*B L K H"], Float[Array, "*B L K H"]]: ...


class SplitProjection(AbstractProjection):
    """Queries from one weight, keys and values from another."""

    q: AbstractEinsum
    kv: AbstractEinsum

    def __init__(self, width: int, config: AttentionConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        assert isinstance(config.kv, OwnKVConfig)
        q_key, kv_key = jax.random.split(key)
        self.q = _query_einsum(width, config, key=q_key, dtype=dtype)
        self.kv = Einsum(
            "...D,CKDH->...CKH",
            (2, config.kv.heads, width, config.head_dim),
            key=kv_key,
            dtype=dtype,
        )

    def __call__(self, x: Float[Array, "*B L D"]):
        kv = self.kv(x)
        return self.q(x), kv[..., 0, :, :], kv[..., 1, :, :]


class KeyIsValueProjection(AbstractProjection):
    """Queries from one weight, and from another what are keys and values both."""

    q: AbstractEinsum
    k: AbstractEinsum

    def __init__(self, width: int, config: AttentionConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        assert isinstance(config.kv, KeyIsValueConfig)
        q_key, k_key = jax.random.split(key)
        self.q = _query_einsum(width, config, key=q_key, dtype=dtype)
        shape = (config.kv.heads, width, config.head_dim)
        self.k = Einsum("...D,KDH->...KH", shape, key=k_key, dtype=dtype)

    def __call__(self, x: Float[Array, "*B L D"]):
        k = self.k(x)
        return self.q(x), k, k


class StackedProjection(AbstractProjection):
    """Queries, keys and values from one weight: as many key/value heads as query heads."""

    qkv: AbstractEinsum

    def __init__(self, width: int, config: AttentionConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        shape = (3, config.heads, width, config.head_dim)
        self.qkv = Einsum("...D,CNDH->...CNH", shape, key=key, dtype=dtype)

    def __call__(self, x: Float[Array, "*B L D"]):
        qkv = self.qkv(x)
        return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]


def _query_einsum(
    width: int, config: AttentionConfig, *, key: PRNGKeyArray, dtype: jnp.dtype
) -> Einsum:
    shape = (config.heads, width, config.head_dim)
    return Einsum("...D,NDH->...NH", shape, key=key, dtype=dtype)


def _projection(
    width: int, config: AttentionConfig, *, key: PRNGKeyArray, dtype: jnp.dtype
) -> AbstractProjection:
    if isinstance(config.kv, KeyIsValueConfig):
        return KeyIsValueProjection(width, config, key=key, dtype=dtype)
    stored = {"NDH,CKDH": SplitProjection, "CNDH": StackedProjection}[config.qkv_axes]
    return stored(width, config, key=key, dtype=dtype)


class Attention(eqx.Module):
    """An attention layer with keys and values of its own."""

    __pdoc__ = summary
    __repr__ = shallow_repr

    projection: AbstractProjection
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    value_norm: RMSNorm | None
    attention_fn: AbstractAttentionFn
    output: AbstractEinsum
    config: AttentionConfig = eqx.field(static=True)

    def __init__(self, width: int, config: AttentionConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        in_key, out_key = jax.random.split(key)
        self.projection = _projection(width, config, key=in_key, dtype=dtype)
        self.query_norm = optional_norm(config.head_dim, config.qk_norm, dtype=dtype)
        self.key_norm = optional_norm(config.head_dim, config.qk_norm, dtype=dtype)
        self.value_norm = optional_norm(config.head_dim, config.v_norm, dtype=dtype)
        self.attention_fn = DotProductAttention(config.softcap)
        self.output = Einsum(
            "...NH,NHD->...D", (config.heads, config.head_dim, width), key=out_key, dtype=dtype
        )
        self.config = config

    @typed
    def __call__(
        self,
        x: Float[Array, "*B L D"],
        sequence: SequenceInfo,
        rope: SinCos,
        cache: AbstractKVCache | None = None,
    ) -> tuple[Float[Array, "*B L D"], AbstractKVCache | None]:
        """Attends from `x` to itself and to the keys of `cache`.

        **Arguments:**

        - `x`: the residual stream, normalised.
        - `sequence`: positions and mask of the tokens, which all layers share.
        - `rope`: sine and cosine of each token's angles, see `rope_sin_cos`.
        - `cache`: keys and values of earlier tokens, if there are some.

        **Returns:** what is added to the stream, before the post-norm; and the updated cache, None
        without one.
        """
        with jax.named_scope("attention"):
            q, k, v = self.projection(x)
            v = normed(self.value_norm, v)
            q = apply_rope(normed(self.query_norm, q), *rope)
            q = q * jnp.asarray(self.config.query_scale, q.dtype)
            k = apply_rope(normed(self.key_norm, k), *rope)

            keys = sequence.keys(jnp.swapaxes(k, -3, -2), jnp.swapaxes(v, -3, -2))
            if cache is not None:
                keys, cache = cache.update(keys, sequence.length, self.config.window)
            mask_spec = sequence.mask_spec(keys, self.config)
            return self.output(self.attention_fn(q, keys.k, keys.v, mask_spec)), cache
