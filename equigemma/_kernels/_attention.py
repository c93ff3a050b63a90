"""Softmax attention of grouped queries."""

from functools import partial

import jax
import jax.numpy as jnp

from equigemma._kernels._each_head import each_head
from equigemma._kernels._precision import wide_dtype
from equigemma._typing import Array, Bool, Float


MASK_VALUE = -2.3819763e38
"""Logit of a masked key: finite, so that a query that attends to nothing gives no NaN."""


def attention(
    q: Float[Array, "*B L N H"],
    k: Float[Array, "*B K S H"],
    v: Float[Array, "*B K S H"],
    mask: Bool[Array, "*B L S"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*B L N H"]:
    """`nn.dot_product_attention`, in float32 or wider but for the products.

    Heads are moved first, so that what shares a key head is one matrix; else XLA on CPU transposes
    the logits. One query has them where they are. Seen with jax 0.10.2.

    **Arguments:** `q`: already scaled. `softcap`: logits become c·tanh(logits / c) before the mask.
    """
    heads, values = k.astype(q.dtype), v.astype(q.dtype)
    if q.shape[-3] == 1:
        return _one_query(q, heads, values, mask, softcap)
    split = q.reshape(*q.shape[:-2], k.shape[-3], -1, q.shape[-1])
    rows = jnp.moveaxis(split, -3, -4).reshape(*k.shape[:-2], -1, q.shape[-1])
    mixed = each_head(partial(_mixed, softcap=softcap), rows, heads, values, mask)
    mixed = mixed.reshape(*k.shape[:-2], q.shape[-3], -1, q.shape[-1])
    return jnp.moveaxis(mixed, -4, -3).reshape(q.shape).astype(q.dtype)


def _one_query(
    q: Float[Array, "*B 1 N H"],
    k: Float[Array, "*B K S H"],
    v: Float[Array, "*B K S H"],
    mask: Bool[Array, "*B 1 S"],
    softcap: float | None,
) -> Float[Array, "*B 1 N H"]:
    wide = wide_dtype(q)
    grouped = q.reshape(*q.shape[:-2], k.shape[-3], -1, q.shape[-1])
    logits = jnp.einsum("...LKGH,...KSH->...KGLS", grouped, k, preferred_element_type=wide)
    logits = jnp.where(mask[..., None, None, :, :], _capped(logits, softcap), MASK_VALUE)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    mixed = jnp.einsum("...KGLS,...KSH->...KGLH", weights, v, preferred_element_type=wide)
    # A step of its own: XLA on CPU has no bfloat16 product with a float32 result in this order.
    return jnp.einsum("...KGLH->...LKGH", mixed).reshape(q.shape).astype(q.dtype)


def _mixed(
    rows: Float[Array, "rows H"],
    k: Float[Array, "S H"],
    v: Float[Array, "S H"],
    mask: Bool[Array, "L S"],
    softcap: float | None,
) -> Float[Array, "rows H"]:
    """Attention of the query heads that share a key head; `rows` are ordered by query."""
    logits = jnp.einsum("rh,sh->rs", rows, k, preferred_element_type=wide_dtype(rows))
    logits = _capped(logits, softcap).reshape(len(mask), -1, len(k))
    logits = jnp.where(mask[:, None, :], logits, MASK_VALUE)
    weights = jax.nn.softmax(logits.reshape(-1, len(k)), axis=-1).astype(rows.dtype)
    return jnp.einsum("rs,sh->rh", weights, v, preferred_element_type=wide_dtype(rows))


def _capped(logits: Array, softcap: float | None) -> Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
