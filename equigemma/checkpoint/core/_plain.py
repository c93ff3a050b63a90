"""A prepared or quantized model as the plain one that formats describe."""

import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import with_article
from equigemma._kernels import activation_axes, result_axes, weight_axes
from equigemma._prepare import JoinedProjection
from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._held import Held, leaf_of, rows_of
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.checkpoint.core._stored import Stored
from equigemma.nn import (
    AbstractEinsum,
    AbstractEmbedding,
    DotProductAttention,
    Einsum,
    Embedding,
    JaxAttention,
    SplitProjection,
    StackedProjection,
    Transformer,
)


def as_plain(model: Transformer) -> Transformer:
    """`model` with every part as it was before `prepare` and `quantize`, if they knew it.

    Leaves of their parts are `Stored`; those in whole 8-bit blocks have the dtype int8.

    **Raises:** `CheckpointError` naming the first part that is not what the config says, such as an
    adapter.
    """
    has_arrays = isinstance(model.embedding, AbstractEmbedding) and jax.tree.leaves(model.embedding)
    dtype = model.dtype if has_arrays else jnp.dtype("float32")
    return _plain(skeleton(model.config), model, dtype, "")


def as_plain_maps(maps: tuple[AbstractEinsum, ...], dtype: jnp.dtype) -> tuple[Einsum, ...]:
    """The same for the linear maps of an embedder."""

    def plain(part: AbstractEinsum, path: str) -> Einsum:
        if isinstance(part, Einsum):
            return part
        if not isinstance(part, Held):
            raise CheckpointError(_unknown(path, part))
        rows = rows_of(part, dtype)
        make = partial(Einsum, "...D,DO->...O", (rows.inputs, rows.outputs), dtype=dtype)
        shape = eqx.filter_eval_shape(make, key=jax.random.key(0))
        return _plain(shape, part, dtype, path)

    return tuple(plain(part, f"dense.{index}") for index, part in enumerate(maps))


def _plain(plain: Any, part: Any, dtype: jnp.dtype, path: str) -> Any:
    """`part`, which is at `path`, in the form of `plain`."""
    match plain, part:
        case SplitProjection(), JoinedProjection(qkv=qkv) if isinstance(qkv, Held):
            rows = rows_of(qkv, dtype)
            assert isinstance(plain.q, Einsum)
            end = math.prod(plain.q.weight.shape) // rows.inputs
            leaves = leaf_of(plain.q, rows.cut(0, end)), leaf_of(plain.kv, rows.cut(end, None))
            return eqx.tree_at(lambda p: (p.q.weight, p.kv.weight), plain, leaves)
        case StackedProjection(), JoinedProjection(qkv=qkv) if isinstance(qkv, Held):
            leaf = leaf_of(plain.qkv, rows_of(qkv, dtype))
            return eqx.tree_at(lambda p: p.qkv.weight, plain, leaf)
        case ((Einsum() | Embedding()), _) if isinstance(part, Held):
            leaf = leaf_of(plain, rows_of(part, dtype))
            return eqx.tree_at(lambda p: p.weight, plain, leaf)
        case Einsum(), Einsum() if plain.eqn != part.eqn and _is_transposed(plain, part):
            return _transposed(plain, part, path)
        case DotProductAttention(), JaxAttention():
            return plain
    return _as_it_is(plain, part, dtype, path)


def _as_it_is(plain: Any, part: Any, dtype: jnp.dtype, path: str) -> Any:
    """`part` with its parts in the form of those of `plain`."""
    if isinstance(plain, jax.ShapeDtypeStruct):
        return _checked(plain, part, path)
    children, structure = _children(plain)
    if type(part) is not type(plain):
        raise CheckpointError(_unknown(path, part))
    found, other = _children(part)
    if isinstance(plain, tuple) and len(children) != len(found):
        raise CheckpointError(
            f"its {path} are {len(found)}, and its config says {len(children)}; change both "
            "together."
        )
    if other != structure:
        raise CheckpointError(
            f"{path or 'the model'} is not the {type(part).__name__} that the config describes; "
            "build the model from its config, and put the weights into that."
        )
    parts = (
        _plain(ours, theirs, dtype, f"{path}.{name}" if path else name)
        for (name, ours), (_, theirs) in zip(children, found, strict=True)
    )
    return jax.tree.unflatten(structure, parts)


def _children(node: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The parts of a node by their names, and what it is without them."""
    found, structure = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda leaf: leaf is not node
    )
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return [(name(key), child) for key, child in found], structure


def _checked(plain: Any, leaf: Any, path: str) -> Any:
    """A leaf, which must have the shape that the config gives it."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise CheckpointError(_unknown(path, leaf))
    if tuple(leaf.shape) != tuple(plain.shape):
        raise CheckpointError(
            f"{path} has the shape {list(leaf.shape)}, and the model's config says "
            f"{list(plain.shape)}; change both together."
        )
    return leaf


def _unknown(path: str, part: Any) -> str:
    kind = "None" if part is None else with_article(type(part).__name__)
    place = f"it has {kind} at {path}"
    if isinstance(part, AbstractEinsum | AbstractEmbedding):
        return (
            f"{place}, which no file format has a name for: fold adapters into the weights with "
            "lora.merge, or write them alone with peft.save."
        )
    return (
        f"{place}, where its config has another part; formats describe what a config builds. "
        "equinox.tree_serialise_leaves writes any tree."
    )


def _is_transposed(plain: Einsum, part: Einsum) -> bool:
    """Whether two equations differ in the order of the axes of their weights alone."""
    sides = (activation_axes, result_axes)
    same = all(axes(plain.eqn) == axes(part.eqn) for axes in sides)
    return same and sorted(weight_axes(plain.eqn)) == sorted(weight_axes(part.eqn))


def _transposed(plain: Einsum, part: Einsum, path: str) -> Einsum:
    stored = weight_axes(part.eqn)
    order = [stored.index(axis) for axis in weight_axes(plain.eqn)]
    shape = tuple(part.weight.shape[axis] for axis in order)

    def read(dtype: np.dtype) -> np.ndarray:
        return np.asarray(part.weight, dtype).transpose(order)

    leaf = Stored(shape, np.dtype(part.weight.dtype), read)
    return eqx.tree_at(lambda p: p.weight, plain, _checked(plain.weight, leaf, f"{path}.weight"))
