"""Attention by `jax.nn.dot_product_attention`, in place of our own."""

from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Bool, Float, typed
from equigemma.nn._attention import AbstractAttend
from equigemma.nn._banded import in_blocks


Implementation = Literal["xla", "cudnn"]
"""Of JAX: `"cudnn"` is for GPUs of NVIDIA, bfloat16, and heads of at most 256 numbers on Hopper,
128 before it.
"""


class DotProductAttend(AbstractAttend):
    """`dot_product`, without the keys that no query may look at. For layers without a soft cap."""

    implementation: Implementation = eqx.field(static=True)
    softcap: float | None = eqx.field(static=True, default=None)

    def __call__(self, q, k, v, sight):
        mix = partial(dot_product, implementation=self.implementation)
        return in_blocks(mix, q, k, v, sight)


@typed
def dot_product(
    q: Float[Array, "*B L N H"],
    k: Float[Array, "*B K S H"],
    v: Float[Array, "*B K S H"],
    mask: Bool[Array, "*B L S"],
    *,
    implementation: Implementation,
) -> Float[Array, "*B L N H"]:
    """What `attend` computes, for every query that may see something.

    **Arguments:** `q`: already scaled.

    **Raises:** what JAX raises where the implementation does not have this shape or dtype.
    """
    rows = q.reshape(-1, *q.shape[-3:])
    keys, values = (jnp.swapaxes(x.reshape(-1, *x.shape[-3:]), 1, 2) for x in (k, v))
    mixed = jax.nn.dot_product_attention(
        rows,
        keys.astype(q.dtype),
        values.astype(q.dtype),
        mask=mask.reshape(-1, 1, *mask.shape[-2:]),
        scale=1.0,
        implementation=implementation,
    )
    return mixed.reshape(q.shape)
