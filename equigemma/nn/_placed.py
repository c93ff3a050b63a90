"""Where results of a model are, on meshes with explicit axes: where the arguments are."""

from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from equigemma._kernels import spec_of


def of_call(arguments: dict[str, Any], result: Any) -> Any:
    """Specs of `Output`: batch axes as those of the tokens, the vocabulary as that of the table."""
    batch = _batch(arguments["tokens"], 1)
    logits = _with_vocabulary(batch, np.ndim(arguments["tokens"]), arguments["self"])
    cache = jax.tree.leaves(_same(arguments.get("cache")))
    return jax.tree.unflatten(jax.tree.structure(result), [logits, *cache, batch])


def of_trunk(arguments: dict[str, Any], result: Any) -> Any:
    """Specs of hidden states and cache."""
    return _batch(arguments["tokens"], 1), _same(arguments.get("cache"))


def of_unembed(arguments: dict[str, Any], result: Any) -> PartitionSpec:
    """The spec of logits."""
    x = arguments["x"]
    return _with_vocabulary(_batch(x, 1), x.ndim - 1, arguments["self"])


def of_images(arguments: dict[str, Any], result: Any) -> PartitionSpec:
    """The spec of soft tokens."""
    return _batch(arguments["images"], 3)


def _batch(array: Any, others: int) -> PartitionSpec:
    """The batch axes of an array that has so many other axes."""
    spec = tuple(spec_of(array))
    return PartitionSpec(*spec[: max(len(spec) - others, 0)])


def _with_vocabulary(batch: PartitionSpec, before: int, model: Any) -> PartitionSpec:
    """The spec of logits, which have so many axes before that of the vocabulary."""
    # Each array of an embedding has the vocabulary as its first axis.
    (table, *_) = jax.tree.leaves(model.output_embedding)
    vocabulary = (*spec_of(table), None)[0]
    if vocabulary is None or vocabulary in jax.tree.leaves(tuple(batch)):
        return batch
    return PartitionSpec(*batch, *[None] * (before - len(batch)), vocabulary)


def _same(tree: Any) -> Any:
    return jax.tree.map(spec_of, tree)
