"""Per-layer embeddings: a vector of every token for every layer, and how a layer takes it in."""

from collections.abc import Sequence
from typing import SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._typing import Array, Float, Int, PRNGKeyArray, typed
from equigemma.config import PerLayerConfig
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._init import random_weight
from equigemma.nn._norm import RMSNorm
from equigemma.nn._summary import shallow_repr, summary


class PerLayerEmbedding(eqx.Module):
    """One vector per token and layer, from the token itself and from its embedding.

    **Source:** gemma `gm/nn/gemma4/_modules.py::Embedder.encode_per_layer_input`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    weight: Float[Array, "V J P"]
    projection: AbstractEinsum
    norm: RMSNorm

    def __init__(
        self,
        width: int,
        layers: int,
        config: PerLayerConfig,
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype,
    ):
        table_key, projection_key = jax.random.split(key)
        shape = (config.vocab, layers, config.dim)
        self.weight = random_weight(table_key, shape, config.dim**-0.5, dtype)
        self.projection = Einsum(
            "...D,DJP->...JP", (width, layers, config.dim), key=projection_key, dtype=dtype
        )
        self.norm = RMSNorm(config.dim, config.norm, dtype=dtype)

    @typed
    def __call__(
        self, tokens: Int[Array, "*B L"], x: Float[Array, "*B L D"]
    ) -> Float[Array, "*B L J P"]:
        """The vectors of all layers. Tokens outside of the table count as token 0.

        **Arguments:**

        - `tokens`: ids.
        - `x`: what the first layer reads.

        **Returns:** a vector of P numbers for each token and each of the J layers, in the dtype of
        `x`.
        """
        with jax.named_scope("per_layer_embedding"):
            vocab, _, dim = self.weight.shape
            row = jnp.where((tokens >= 0) & (tokens < vocab), tokens, 0)
            looked_up = self.weight[row].astype(x.dtype) * jnp.sqrt(dim).astype(x.dtype)
            # The norm undoes any scale before it, but not its epsilon: the factor stays.
            projected = self.projection(x) * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
            return (self.norm(projected) + looked_up) * jnp.asarray(2**-0.5, x.dtype)

    def with_layers(self, layers: Sequence[SupportsIndex]) -> "PerLayerEmbedding":
        """The vectors of chosen layers.

        **Raises:** `ValueError` if the projection is not a plain one.
        """
        projection, index = self.projection, np.asarray(layers)
        if not isinstance(projection, Einsum):
            raise ValueError(
                "The per-layer embedding of this model has a projection that is prepared, in few "
                f"bits or adapted, a {type(projection).__name__}. Choose layers before that."
            )
        weights = self.weight[:, index], projection.weight[:, index]
        return eqx.tree_at(lambda e: (e.weight, e.projection.weight), self, weights)


class PerLayerGate(eqx.Module):
    """`norm(out(gelu(gate(x)) * per_layer_input))`, which a layer adds to its stream.

    **Source:** gemma `gm/nn/gemma4/_modules.py::Block`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    gate: AbstractEinsum
    output: AbstractEinsum
    norm: RMSNorm

    def __init__(self, width: int, config: PerLayerConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        gate_key, out_key = jax.random.split(key)
        self.gate = Einsum("...D,DP->...P", (width, config.dim), key=gate_key, dtype=dtype)
        self.output = Einsum("...P,PD->...D", (config.dim, width), key=out_key, dtype=dtype)
        self.norm = RMSNorm(width, config.norm, dtype=dtype)

    @typed
    def __call__(
        self, x: Float[Array, "*B L D"], per_layer_input: Float[Array, "*B L P"]
    ) -> Float[Array, "*B L D"]:
        with jax.named_scope("per_layer_gate"):
            return self.norm(
                self.output(jax.nn.gelu(self.gate(x), approximate=True) * per_layer_input)
            )
