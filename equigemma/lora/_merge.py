"""Adapters folded into the weights that they are around, and out of them again."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import result_axes, weight_axes
from equigemma._typing import Array, Float, Int
from equigemma.lora._adapters import Adapter, DoRAEinsum, lengths, product
from equigemma.lora._embedding import LoRAEmbedding
from equigemma.lora._tree import layers, parts, replace
from equigemma.nn import (
    AbstractEinsum,
    AbstractEmbedding,
    AbstractExpertEinsum,
    Einsum,
    Embedding,
    Transformer,
    check_unstacked,
)


class MergedEinsum(AbstractExpertEinsum):
    """A weight with an adapter folded in, and the two as they were."""

    merged: Einsum
    adapter: Adapter
    eqn: str = eqx.field(static=True)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.merged(x)

    def by_expert(
        self, x: Float[Array, "rows ..."], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows ..."]:
        return self.merged.by_expert(x, expert)


def merge(model: Any, *, keep: bool = False) -> Any:
    """The model with every adapter folded into its weight, which must be dense.

    The sum is taken in float32 and rounded once, to the dtype of the weight. What was kept by an
    earlier call is dropped, unless `keep` says otherwise.

    **Arguments:**

    - `model`: one with adapters.
    - `keep`: also keeps what was merged, in as much memory again, for `unmerge`: out of a rounded
      sum nobody gets the weight back bit for bit.

    **Returns:** the model, plain again unless `keep` is set.

    **Raises:** `ValueError` for an adapter over a weight of another kind, such as a quantised one.
    """
    check_unstacked(model)

    def merged(path: str, einsum: AbstractEinsum) -> AbstractEinsum:
        if isinstance(einsum, MergedEinsum) and not keep:
            return einsum.merged
        if not isinstance(einsum, Adapter):
            return einsum
        base = merged(path, einsum.base)
        if not isinstance(base, Einsum):
            raise ValueError(
                f"{path}: only a dense weight can take an adapter in, this one is a "
                f"{type(base).__name__}. See `lora.transfer`."
            )
        return eqx.tree_at(lambda e: e.weight, base, _sum(base, einsum))

    def kept(path: str, einsum: AbstractEinsum) -> AbstractEinsum:
        whole = merged(path, einsum)
        if not keep or not isinstance(einsum, Adapter):
            return whole
        assert isinstance(whole, Einsum)
        return MergedEinsum(merged=whole, adapter=einsum, eqn=einsum.eqn)

    return _with_tables(replace(model, kept), keep)


def unmerge(model: Any) -> Any:
    """The model as it was before `merge(..., keep=True)`, bit for bit.

    **Arguments:** `model`: what `merge` returned.

    **Returns:** the model with its adapters around their weights.

    **Raises:** `ValueError` if nothing of it was merged so.
    """
    found = False

    def apart(path: str, einsum: AbstractEinsum) -> AbstractEinsum:
        nonlocal found
        del path
        if not isinstance(einsum, MergedEinsum):
            return einsum
        found = True
        return einsum.adapter

    before = replace(model, apart)
    if not found:
        raise ValueError("The model keeps no adapters to unmerge; merge it with keep=True.")
    return before


def _with_tables(model: Any, keep: bool) -> Any:
    """The model with the adapters of its embeddings folded in."""

    def merged(part: Any) -> Any:
        return _untangled(part) if isinstance(part, Transformer) else part

    found = [path for path, part in parts(model) if isinstance(part, LoRAEmbedding)]
    if found and keep:
        raise ValueError(
            f"{found[0]}: keep=True is for projections; merge the adapters of embeddings without."
        )
    if not found:
        return model
    return jax.tree.map(merged, model, is_leaf=lambda part: isinstance(part, Transformer))


def _untangled(model: Transformer) -> Transformer:
    """A model whose embeddings are plain; untied if its two uses are of two tables by now."""
    tables = _table(model.embedding, "encode"), _table(model.output_embedding, "decode")
    uses = {layer.use for layer in layers(model.embedding)}
    if model.lm_head is None and uses <= {"both"}:
        return eqx.tree_at(lambda m: m.embedding, model, tables[0])
    return eqx.tree_at(lambda m: (m.embedding, m.lm_head), model.untied(), tables)


def _table(embedding: AbstractEmbedding, use: str) -> Embedding:
    """A plain embedding with the table of one use."""
    if not isinstance(embedding, LoRAEmbedding):
        if isinstance(embedding, Embedding):
            return embedding
        raise ValueError(
            f"embedding: only a dense table can take an adapter in, this one is a "
            f"{type(embedding).__name__}. See `lora.transfer`."
        )
    base = _table(embedding.base, use)
    return base if embedding.use not in (use, "both") else _plus(base, embedding)


@jax.jit
def _plus(base: Embedding, adapter: LoRAEmbedding) -> Embedding:
    table = base.weight.astype(jnp.float32) + adapter.delta()
    return eqx.tree_at(lambda e: e.weight, base, table.astype(base.weight.dtype))


@jax.jit
def _sum(base: Einsum, adapter: Adapter) -> Float[Array, "..."]:
    weight = base.weight.astype(jnp.float32)
    weight = weight + adapter.scale * product(base.eqn, adapter.down, adapter.up)
    if isinstance(adapter, DoRAEinsum):
        weight = weight * _spread(base.eqn, adapter.magnitude / lengths(base.eqn, weight))
    return weight.astype(base.weight.dtype)


def _spread(eqn: str, per_output: Float[Array, "..."]) -> Float[Array, "..."]:
    """Values per output, shaped to multiply the weight."""
    inputs = tuple(
        index for index, axis in enumerate(weight_axes(eqn)) if axis not in result_axes(eqn)
    )
    kept = "".join(axis for axis in weight_axes(eqn) if axis in result_axes(eqn))
    return jnp.expand_dims(jnp.einsum(f"{result_axes(eqn)}->{kept}", per_output), inputs)
