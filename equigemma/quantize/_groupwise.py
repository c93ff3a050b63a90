"""The parts of a model whose weights are held in groups."""

import itertools

import equinox as eqx
import jax.numpy as jnp

from equigemma._kernels import activation_axes, contract
from equigemma._typing import Array, Float, Float32, Int, typed
from equigemma.nn import AbstractEmbedding, AbstractExpertEinsum, nan_outside
from equigemma.nn._embed import Term
from equigemma.quantize._int4_groups import Int4Groups
from equigemma.quantize._int8_groups import Int8Groups


class GroupwiseEinsum(AbstractExpertEinsum):
    """A matrix with one row for each output, cut into several of fewer columns where it is wide."""

    matrices: tuple[Int8Groups | Int4Groups, ...]
    eqn: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        batch = x.shape[: x.ndim - len(activation_axes(self.eqn))]
        parts = self._cut(x.reshape(*batch, -1))
        products = [matrix.matmul_t(part) for matrix, part in parts]
        product = sum(products[1:], start=products[0])
        return product.astype(x.dtype).reshape(*batch, *self.shape)

    def by_expert(
        self, x: Float[Array, "rows ..."], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows ..."]:
        parts = self._cut(x.reshape(len(x), -1))
        products = [matrix.times_by_expert(part, expert) for matrix, part in parts]
        product = sum(products[1:], start=products[0])
        return product.astype(x.dtype).reshape(-1, *self.shape)

    def _cut(self, rows: Array) -> list[tuple[Int8Groups | Int4Groups, Array]]:
        """Each matrix with its columns of `rows`."""
        starts = itertools.accumulate((matrix.inputs for matrix in self.matrices), initial=0)
        return [
            (matrix, rows[..., start : start + matrix.inputs])
            for matrix, start in zip(self.matrices, starts, strict=False)
        ]


class GroupwiseExperts(AbstractExpertEinsum):
    """The weights of all experts of a mixture, each a matrix with one row for each output.

    Its equation has the axes of the result before the others, and experts first in both arrays.
    """

    weight: Int8Groups | Int4Groups
    eqn: str = eqx.field(static=True)
    axes: str = eqx.field(static=True)
    """Those of the weight that it was made from, in their order."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return contract(self.eqn, x, self.weight.floats().astype(x.dtype))

    def by_expert(
        self, x: Float[Array, "rows inputs"], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows ..."]:
        return self.weight.times_by_expert(x, expert).astype(x.dtype)


class GroupwiseEmbedding(AbstractEmbedding):
    """An `Embedding` in groups, and the dtype of activations, which it no longer shows."""

    weight: Int8Groups
    activations: jnp.dtype = eqx.field(static=True)

    @property
    def dtype(self) -> jnp.dtype:
        return self.activations

    @property
    def table(self) -> Float[Array, "V D"]:
        return self.weight.floats().astype(self.dtype)

    @typed
    def encode(self, tokens: Int[Array, "*B L"]) -> Float[Array, "*B L D"]:
        rows = self.weight.rows(tokens)
        rows = rows.astype(self.dtype) * jnp.sqrt(rows.shape[-1]).astype(self.dtype)
        return nan_outside(rows, tokens, len(self.weight.weight))

    @typed
    def decode(self, x: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        return self.weight.matmul_t(x)

    def terms(self, x: Float[Array, "*B D"]) -> tuple[Term, ...]:
        return ((x, self),)
