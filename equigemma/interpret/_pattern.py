"""Attention with a function between the softmax and the product with the values."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from equigemma._kernels import wide_dtype
from equigemma._typing import Array, Bool, Float
from equigemma.nn import MASK_VALUE, AbstractAttentionFn, MaskSpec


def attend_with(
    change: Callable[[Float[Array, "*B N L S"]], Float[Array, "*B N L S"]],
    attention_fn: AbstractAttentionFn,
    q: Float[Array, "*B L N H"],
    k: Float[Array, "*B K S H"],
    v: Float[Array, "*B K S H"],
    mask_spec: MaskSpec,
) -> Float[Array, "*B L N H"]:
    """What `attention_fn` returns for the attention weights that `change` makes of its own.

    The weights are float32 or wider, those of all heads, queries and keys at once; slots of a cache
    that hold no token have a weight of 0.
    """
    weights = _weights(q, k, mask_spec.mask(), attention_fn.softcap)
    by_head = jnp.einsum("...KLGS->...KGLS", weights)
    pattern = by_head.reshape(*q.shape[:-3], q.shape[-2], *weights.shape[-3::2])
    changed = change(pattern).reshape(by_head.shape)
    rows = jnp.einsum("...KGLS->...KLGS", changed).reshape(*k.shape[:-2], -1, k.shape[-2])
    # Products of the shape, and in the dtypes, of those in `attention_fn`: no change is the same
    # bits.
    mixed = jnp.einsum(
        "...rs,...sh->...rh",
        rows.astype(q.dtype),
        v.astype(q.dtype),
        preferred_element_type=wide_dtype(q),
    )
    mixed = mixed.reshape(*weights.shape[:-1], q.shape[-1])
    return jnp.einsum("...KLGH->...LKGH", mixed).reshape(q.shape).astype(q.dtype)


def _weights(
    q: Float[Array, "*B L N H"],
    k: Float[Array, "*B K S H"],
    mask: Bool[Array, "*B L S"],
    softcap: float | None,
) -> Float[Array, "*B K L G S"]:
    grouped = jnp.einsum("...LKGH->...KLGH", q.reshape(*q.shape[:-2], k.shape[-3], -1, q.shape[-1]))
    rows = grouped.reshape(*k.shape[:-2], -1, q.shape[-1])
    logits = jnp.einsum(
        "...rh,...sh->...rs", rows, k.astype(q.dtype), preferred_element_type=wide_dtype(q)
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits.reshape(*grouped.shape[:-1], k.shape[-2])
    logits = jnp.where(mask[..., None, :, None, :], logits, MASK_VALUE)
    return jax.nn.softmax(logits, axis=-1)
