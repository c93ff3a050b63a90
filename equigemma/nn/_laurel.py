"""LAuReL: a learned low-rank path beside attention."""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, PRNGKeyArray, typed
from equigemma.config import NormConfig
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._norm import RMSNorm
from equigemma.nn._summary import shallow_repr, summary


class Laurel(eqx.Module):
    """`x + norm(right(left(x)))` through `Q` dimensions.

    **Source:** Menghani et al. 2024, arXiv:2411.07501; gemma `gm/nn/gemma3n/_modules.py::Laurel`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    left: AbstractEinsum
    right: AbstractEinsum
    norm: RMSNorm

    def __init__(
        self, width: int, rank: int, norm: NormConfig, *, key: PRNGKeyArray, dtype: jnp.dtype
    ):
        left_key, right_key = jax.random.split(key)
        self.left = Einsum("...D,DQ->...Q", (width, rank), key=left_key, dtype=dtype)
        self.right = Einsum("...Q,QD->...D", (rank, width), key=right_key, dtype=dtype)
        self.norm = RMSNorm(width, norm, dtype=dtype)

    @typed
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        with jax.named_scope("laurel"):
            return x + self.norm(self.right(self.left(x)))
