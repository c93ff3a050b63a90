"""Attention without keys and values of its own: queries that attend to those of an earlier layer.

What the owner lends is a `SharedKVCache`; `Transformer` carries it from layer to layer.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, PRNGKeyArray, typed
from equigemma.config import AttentionConfig, KeyIsValueConfig, OwnKVConfig, SharedKVConfig
from equigemma.nn._attention import (
    AbstractAttentionFn,
    Attention,
    DotProductAttention,
    SequenceInfo,
)
from equigemma.nn._cache import AbstractKVCache, SharedKVCache
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._norm import RMSNorm, normed, optional_norm
from equigemma.nn._rope import SinCos, apply_rope
from equigemma.nn._summary import shallow_repr, summary


class UnusedKV(eqx.Module):
    """Weights that a checkpoint stores for a layer which never reads them.

    Bare arrays, so that nothing which looks for projections or norms finds them. They are carried
    along only to give a checkpoint back as it was.
    """

    kv: Float[Array, "C K D H"] | None
    k: Float[Array, "K D H"] | None
    key_norm: Float[Array, " H"] | None

    def __init__(
        self,
        width: int,
        config: AttentionConfig,
        stored: OwnKVConfig | KeyIsValueConfig,
        *,
        dtype: jnp.dtype,
    ):
        shape = (stored.heads, width, config.head_dim)
        tied = isinstance(stored, KeyIsValueConfig)
        self.kv = None if tied else jnp.zeros((2, *shape), dtype)
        self.k = jnp.zeros(shape, dtype) if tied else None
        norm = optional_norm(config.head_dim, config.qk_norm, dtype=dtype)
        self.key_norm = None if norm is None else norm.scale


class SharedKVAttention(eqx.Module):
    """An attention layer that has queries only.

    **Source:** gemma `gm/nn/gemma4/_modules.py::Attention` with `kv_shared_cache`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    query: AbstractEinsum
    query_norm: RMSNorm | None
    attention_fn: AbstractAttentionFn
    output: AbstractEinsum
    unused: UnusedKV | None
    config: AttentionConfig = eqx.field(static=True)

    def __init__(self, width: int, config: AttentionConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        assert isinstance(config.kv, SharedKVConfig)
        in_key, out_key = jax.random.split(key)
        heads, head_dim = config.heads, config.head_dim
        self.query = Einsum("...D,NDH->...NH", (heads, width, head_dim), key=in_key, dtype=dtype)
        self.query_norm = optional_norm(head_dim, config.qk_norm, dtype=dtype)
        self.attention_fn = DotProductAttention(config.softcap)
        self.output = Einsum("...NH,NHD->...D", (heads, head_dim, width), key=out_key, dtype=dtype)
        stored = config.kv.unused
        self.unused = None if stored is None else UnusedKV(width, config, stored, dtype=dtype)
        self.config = config

    @typed
    def __call__(
        self,
        x: Float[Array, "*B L D"],
        sequence: SequenceInfo,
        rope: SinCos,
        cache: AbstractKVCache | None = None,
    ) -> tuple[Float[Array, "*B L D"], None]:
        """Attends from `x` to the keys of an earlier layer.

        **Arguments:**

        - `x`: the residual stream, normalised.
        - `sequence`: positions and mask of the tokens, which all layers share.
        - `rope`: sine and cosine of each token's angles, see `rope_sin_cos`.
        - `cache`: the `SharedKVCache` that the layer which computes the keys returned.

        **Returns:** what is added to the stream, before the post-norm; and None, as it has no cache
        of its own.
        """
        if not isinstance(cache, SharedKVCache) or cache.keys is None:
            raise ValueError(
                "This layer attends to the keys of an earlier one; call it with the SharedKVCache "
                f"that layer returned, got {type(cache).__name__}."
            )
        with jax.named_scope("attention"):
            q = apply_rope(normed(self.query_norm, self.query(x)), *rope)
            q = q * jnp.asarray(self.config.query_scale, q.dtype)
            keys = cache.keys
            mask_spec = sequence.mask_spec(keys, self.config)
            return self.output(self.attention_fn(q, keys.k, keys.v, mask_spec)), None


def make_attention(
    width: int, config: AttentionConfig, *, key: PRNGKeyArray, dtype: jnp.dtype
) -> Attention | SharedKVAttention:
    """The attention layer that `config` describes, with random weights."""
    kind = SharedKVAttention if isinstance(config.kv, SharedKVConfig) else Attention
    return kind(width, config, key=key, dtype=dtype)
