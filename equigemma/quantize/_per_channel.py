"""Eight bits with one scale for each row of a matrix, that is for each output."""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import activation_axes, contract, contract_experts
from equigemma._prepare import matmul_t, matmul_t_by_expert
from equigemma._typing import Array, Float, Float32, Int, Int8, typed
from equigemma.nn import (
    AbstractEmbedding,
    AbstractExpertEinsum,
    nan_outside,
    one_expert,
)
from equigemma.nn._embed import Term


class Int8Einsum(AbstractExpertEinsum):
    """A `MatrixEinsum` in 8 bits: sums of integers times activations, scaled at the end."""

    matrices: tuple[Int8[Array, "outputs _"], ...]
    scale: Float32[Array, " outputs"]
    eqn: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        batch = x.shape[: x.ndim - len(activation_axes(self.eqn))]
        product = matmul_t(x.reshape(*batch, -1), self.matrices)
        product = product * jnp.broadcast_to(self.scale, product.shape)
        return product.astype(x.dtype).reshape(*batch, *self.shape)

    def by_expert(
        self, x: Float[Array, "rows ..."], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows ..."]:
        product = matmul_t_by_expert(x.reshape(len(x), -1), self.matrices, expert)
        return (product * self.scale[expert]).astype(x.dtype).reshape(-1, *self.shape)


class Int8Experts(AbstractExpertEinsum):
    """The same for all experts of a mixture: each has a matrix with one row for each output.

    Its equation has the axes of the result before the others, and experts first in both arrays.
    """

    weight: Int8[Array, "..."]
    scale: Float32[Array, "..."]
    eqn: str = eqx.field(static=True)
    axes: str = eqx.field(static=True)
    """Those of the weight that it was made from, in their order."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        product = contract(self.eqn, x, self.weight, jnp.float32)
        return (product * jnp.broadcast_to(self.scale, product.shape)).astype(x.dtype)

    def by_expert(
        self, x: Float[Array, "rows ..."], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows ..."]:
        product = contract_experts(one_expert(self.eqn), x, self.weight, expert, jnp.float32)
        return (product * self.scale[expert]).astype(x.dtype)


class Int8Embedding(AbstractEmbedding):
    """An `Embedding` in 8 bits, and the dtype of activations, which it no longer shows."""

    weight: Int8[Array, "V D"]
    scale: Float32[Array, " V"]
    activations: jnp.dtype = eqx.field(static=True)

    @property
    def dtype(self) -> jnp.dtype:
        return self.activations

    @property
    def table(self) -> Float[Array, "V D"]:
        return (self.weight.astype(jnp.float32) * self.scale[:, None]).astype(self.dtype)

    @typed
    def encode(self, tokens: Int[Array, "*B L"]) -> Float[Array, "*B L D"]:
        rows = self.weight[tokens].astype(jnp.float32) * self.scale[tokens][..., None]
        rows = rows.astype(self.dtype) * jnp.sqrt(rows.shape[-1]).astype(self.dtype)
        return nan_outside(rows, tokens, len(self.weight))

    @typed
    def decode(self, x: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        logits = contract("...D,VD->...V", x, self.weight, jnp.float32)
        return logits * jnp.broadcast_to(self.scale, logits.shape)

    def terms(self, x: Float[Array, "*B D"]) -> tuple[Term, ...]:
        return ((x, self),)


@jax.jit
def rounded_rows(
    matrices: tuple[Float[Array, "outputs _"], ...],
) -> tuple[tuple[Int8[Array, "outputs _"], ...], Float32[Array, " outputs"]]:
    """Each row divided by its scale, which makes its largest number 127 or −127, and rounded.

    **Source:** Jacob et al. 2018, arXiv:1712.05877, the symmetric case: no zero point.
    """
    wide = [matrix.astype(jnp.float32) for matrix in matrices]
    largest = jnp.stack([jnp.abs(matrix).max(axis=1) for matrix in wide]).max(axis=0)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return tuple(jnp.round(m / scale[:, None]).astype(jnp.int8) for m in wide), scale
