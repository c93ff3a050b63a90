"""Attention by other libraries' functions, in place of our own: JAX's and tokamax's."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import blockwise_attention
from equigemma._typing import Array, Bool, Float, typed
from equigemma.nn._attention import AbstractAttentionFn
from equigemma.nn._mask_spec import MaskSpec


Implementation = Literal["xla", "cudnn"]
"""Of JAX: `"cudnn"` is for GPUs of NVIDIA, bfloat16, and heads of at most 256 numbers on Hopper,
128 before it.
"""

Dot = Callable[..., Float[Array, "B L N H"]]
"""Queries `[B L N H]`, keys and values `[B S K H]` and `mask=[B 1 L S]` to what they mix."""


class JaxAttention(AbstractAttentionFn):
    """`dot_product`, without the keys that no query attends to. For layers without a soft cap."""

    implementation: Implementation = eqx.field(static=True)
    softcap: float | None = eqx.field(static=True, default=None)

    def __call__(
        self,
        q: Float[Array, "*B L N H"],
        k: Float[Array, "*B K S H"],
        v: Float[Array, "*B K S H"],
        mask_spec: MaskSpec,
    ):
        mix = partial(dot_product, implementation=self.implementation)
        return blockwise_attention(mix, q, k, v, mask_spec)


class TokamaxAttention(AbstractAttentionFn):
    """`tokamax_dot_product`, without the keys that no query attends to."""

    softcap: float | None = eqx.field(static=True)

    def __check_init__(self):
        load_tokamax()

    def __call__(
        self,
        q: Float[Array, "*B L N H"],
        k: Float[Array, "*B K S H"],
        v: Float[Array, "*B K S H"],
        mask_spec: MaskSpec,
    ):
        return blockwise_attention(
            partial(tokamax_dot_product, softcap=self.softcap), q, k, v, mask_spec
        )


@typed
def dot_product(
    q: Float[Array, "*B L N H"],
    k: Float[Array, "*B K S H"],
    v: Float[Array, "*B K S H"],
    mask: Bool[Array, "*B L S"],
    *,
    implementation: Implementation,
) -> Float[Array, "*B L N H"]:
    """`nn.dot_product_attention` by `jax.nn.dot_product_attention`; zeros for a query that attends
    to nothing.

    **Arguments:** `q`: already scaled.

    **Raises:** `RuntimeError` for `"cudnn"` without an NVIDIA GPU; what JAX raises where the
    implementation does not have this shape or dtype.
    """
    if implementation == "cudnn":
        _check_gpu()
    dot = partial(jax.nn.dot_product_attention, scale=1.0, implementation=implementation)
    return _mixed(dot, q, k, v, mask)


@typed
def tokamax_dot_product(
    q: Float[Array, "*B L N H"],
    k: Float[Array, "*B K S H"],
    v: Float[Array, "*B K S H"],
    mask: Bool[Array, "*B L S"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*B L N H"]:
    """`nn.dot_product_attention` by `tokamax.dot_product_attention`, which chooses a kernel for the
    device; zeros for a query that attends to nothing.

    **Arguments:** `q`: already scaled. `softcap`: logits become c·tanh(logits / c) before the mask.

    **Raises:** `ImportError` without tokamax.
    """
    attention = load_tokamax().dot_product_attention
    return _mixed(partial(attention, scale=1.0, logits_soft_cap=softcap), q, k, v, mask)


def load_tokamax() -> Any:
    """The module `tokamax`.

    **Raises:** `ImportError` with what to install.
    """
    try:
        return import_module("tokamax")
    except ImportError as error:
        raise ImportError(
            "Attention by tokamax needs that library, on Python 3.12 or newer: pip install "
            '"equigemma[tokamax]".'
        ) from error


def _mixed(dot: Dot, q: Array, k: Array, v: Array, mask: Array) -> Float[Array, "*B L N H"]:
    rows = q.reshape(-1, *q.shape[-3:])
    keys, values = (jnp.swapaxes(x.reshape(-1, *x.shape[-3:]), 1, 2) for x in (k, v))
    # What a kernel gives for a row without keys is its own affair, NaN for some, and so is the
    # derivative. So it gets none: such a row attends to all keys, and what comes of it is not used.
    attends = mask.any(axis=-1)
    given = (mask | ~attends[..., None]).reshape(-1, 1, *mask.shape[-2:])
    # These libraries promote dtypes in their own code, also where a user wants none promoted.
    with jax.numpy_dtype_promotion("standard"):
        mixed = dot(rows, keys.astype(q.dtype), values.astype(q.dtype), mask=given)
    zero = jnp.zeros((), mixed.dtype)
    return jnp.where(attends[..., None, None], mixed.reshape(q.shape), zero)


def _check_gpu() -> None:
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        raise RuntimeError(
            'A model with attention="cudnn" runs on NVIDIA GPUs only, and JAX finds none here: '
            'install jax[cuda13] where there is one, or prepare with attention="xla" or without.'
        ) from error
