"""Token embedding and, with the same table or with one of its own, unembedding."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp

from equigemma._kernels import contract, not_hoisted
from equigemma._typing import Array, Float, Float32, Int, PRNGKeyArray, typed
from equigemma.nn._init import random_weight


class AbstractEmbedding(eqx.Module):
    """Tokens to vectors, and vectors to logits."""

    @property
    @abstractmethod
    def dtype(self) -> jnp.dtype:
        """The dtype of what `encode` returns."""

    @property
    @abstractmethod
    def table(self) -> Float[Array, "V D"]:
        """One row for each token: `decode` multiplies with them, `encode` reads them times √D."""

    @abstractmethod
    def encode(self, tokens: Int[Array, "*B L"]) -> Float[Array, "*B L D"]:
        """Embeddings of ids, as the first layer reads them; NaN for ids outside of [0, V)."""

    @abstractmethod
    def decode(self, x: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """The logits."""

    @abstractmethod
    def terms(self, x: Float[Array, "*B D"]) -> "tuple[Term, ...]":
        """The products that add up to `decode(x)`, for losses that take a few words at a time."""


Term = tuple[Float[Array, "..."], "Float[Array, '...'] | AbstractEmbedding"]
"""Activations, and the table `[V, …]` that they are multiplied with. Every array of a table that
is an embedding has the vocabulary as its first axis."""


class Embedding(AbstractEmbedding):
    """A table `[V, D]`, read row by row on the way in and multiplied with on the way out.

    **Source:** gemma `gm/nn/_modules.py::Embedder`.
    """

    weight: Float[Array, "V D"]

    def __init__(self, vocab: int, width: int, *, key: PRNGKeyArray, dtype: jnp.dtype):
        # Rows of norm 1: multiplied by the root of the width on the way in, they enter with unit
        # variance, and logits of a normalised stream start at unit variance too.
        self.weight = random_weight(key, (vocab, width), width**-0.5, dtype)

    @property
    def dtype(self) -> jnp.dtype:
        return activation_dtype(self.weight.dtype)

    @property
    def table(self) -> Float[Array, "V D"]:
        return self.weight

    @typed
    def encode(self, tokens: Int[Array, "*B L"]) -> Float[Array, "*B L D"]:
        """Rows of the table times √D, a factor rounded to the dtype of activations, as in training.

        NaN for ids outside of [0, V).
        """
        weight, tokens = not_hoisted(self.weight, until=tokens)
        rows = weight[tokens].astype(self.dtype)
        rows = rows * jnp.sqrt(weight.shape[-1]).astype(self.dtype)
        return nan_outside(rows, tokens, len(weight))

    @typed
    def decode(self, x: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Inner products with every row, in float32: the logits."""
        return contract("...D,VD->...V", x, self.weight, jnp.float32)

    def terms(self, x: Float[Array, "*B D"]) -> tuple[Term, ...]:
        return ((x, self.weight),)


def nan_outside(
    rows: Float[Array, "*B D"], ids: Int[Array, "*B"], size: int
) -> Float[Array, "*B D"]:
    """`rows`, NaN where the id that each belongs to is not in [0, size).

    An index beyond an array reads its last row, a negative one counts from its end.

    **Arguments:**

    - `rows`: a vector for each id.
    - `ids`: of any value.
    - `size`: the number of ids that exist.

    **Returns:** `rows`, NaN where there is no such id.
    """
    known = (ids >= 0) & (ids < size)
    return jnp.where(known[..., None], rows, jnp.asarray(jnp.nan, rows.dtype))


def activation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of activations beside weights of `dtype`: the same, but float32 for float16.

    Residual streams exceed 65,504, the end of float16: that of Gemma 3 270M reaches 104,000.

    **Arguments:** `dtype`: that of the weights.

    **Returns:** a dtype.
    """
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else jnp.dtype(dtype)
