"""An adapter of an embedding: of its table on the way in, on the way out, or both."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp

from equigemma._kernels import contract
from equigemma._typing import Array, Float, Float32, Int, typed
from equigemma.nn import AbstractEmbedding
from equigemma.nn._embed import Term


class LoRAEmbedding(AbstractEmbedding):
    """`base`, and beside it a table of low rank: scale · `up` · `down`.

    A table that is tied reads tokens and writes logits, and either use may have an adapter of its
    own: `use` says which this one is for. For both, one adapter is around another.
    """

    base: AbstractEmbedding
    up: Float[Array, "V r"]
    down: Float[Array, "r D"]
    scale: float = eqx.field(static=True)
    use: Literal["encode", "decode", "both"] = eqx.field(static=True)

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def table(self) -> Float[Array, "V D"]:
        """The one that `decode` multiplies with."""
        if self.use == "encode":
            return self.base.table
        return (self.base.table.astype(jnp.float32) + self.delta()).astype(self.dtype)

    def delta(self) -> Float32[Array, "V D"]:
        """What is added to the table."""
        factors = (factor.astype(jnp.float32) for factor in (self.up, self.down))
        return self.scale * jnp.einsum("Vr,rD->VD", *factors, precision="highest")

    @typed
    def encode(self, tokens: Int[Array, "*B L"]) -> Float[Array, "*B L D"]:
        rows = self.base.encode(tokens)
        if self.use == "decode":
            return rows
        # The factor that rows of the table are multiplied with.
        root = jnp.sqrt(rows.shape[-1]).astype(rows.dtype).astype(self.up.dtype)
        low = contract("...r,rD->...D", self.up[tokens], self.down)
        return rows + (self.scale * root * low).astype(rows.dtype)

    @typed
    def decode(self, x: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        logits = self.base.decode(x)
        if self.use == "encode":
            return logits
        low = contract("...D,rD->...r", x, self.down)
        return logits + self.scale * contract("...r,Vr->...V", low, self.up, jnp.float32)

    def terms(self, x: Float[Array, "*B D"]) -> tuple[Term, ...]:
        terms = self.base.terms(x)
        if self.use == "encode":
            return terms
        low = self.scale * contract("...D,rD->...r", x, self.down)
        return (*terms, (low, self.up))
