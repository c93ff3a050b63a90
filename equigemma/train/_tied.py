"""Tied embeddings: one gradient for the lookup of rows and the output projection."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import linear_map
from equigemma._typing import Array, Float, Int


@jax.custom_jvp
def tied_lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "*B L"]
) -> tuple[Float[Array, "*B L D"], Float[Array, "V D"]]:
    """`table[tokens]`, and the table for whatever else it is used in.

    The gradient of that other use is where that of the rows is added, in place. As two uses of one
    array they would have a gradient of the table's size each, all but a few rows of one being zero.
    """
    return _read(tokens, table)


@partial(tied_lookup.defjvp, symbolic_zeros=True)
def _derivative(primals: tuple, tangents: tuple):
    table, tokens = primals
    primal_out = tied_lookup(table, tokens)
    return primal_out, linear_map(_read, _add_rows, tokens, tangents[0], like=primal_out)


def _read(tokens: Int[Array, "*B L"], table: Float[Array, "V D"]):
    return table[tokens], table


def _add_rows(tokens: Int[Array, "*B L"], cotangents: tuple[Array, Array]):
    rows, table = cotangents
    return table.at[tokens].add(rows.astype(table.dtype))


class PrecomputedEmbedding(eqx.Module):
    """Replaces a model's embedding: rows that were looked up before."""

    rows: Float[Array, "*B L D"]

    @classmethod
    def scaled(
        cls, rows: Float[Array, "*B L D"], dtype: jnp.dtype | type | str
    ) -> "PrecomputedEmbedding":
        """Rows in another dtype, times √D rounded to it, as a table of that dtype gives them."""
        return cls(rows.astype(dtype) * jnp.sqrt(rows.shape[-1]).astype(dtype))

    @property
    def dtype(self) -> jnp.dtype:
        """That of the rows, and so of the activations."""
        return self.rows.dtype

    def encode(self, tokens: Int[Array, "*B L"]) -> Float[Array, "*B L D"]:
        """The rows; the tokens must be those that they were looked up for."""
        assert tokens.shape == self.rows.shape[:-1]
        return self.rows
