"""Weights in the 8-bit blocks of their file: integers and scales are kept, no floats are made.

What a file holds otherwise is read as always.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equigemma._kernels import activation_axes, result_axes, weight_axes
from equigemma._prepare import JoinedProjection
from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._keymap import leaves
from equigemma.checkpoint.core._stored import Stored, aligned
from equigemma.nn import Einsum, Embedding, SplitProjection, StackedProjection, Transformer, Vision
from equigemma.quantize import GroupwiseEinsum, GroupwiseEmbedding, GroupwiseExperts, Int8Groups
from equigemma.quantize._int8_groups import column_cuts


GROUP = 32
"""Numbers of one block."""


def keep_blocks(model: Transformer, dtype: np.dtype) -> Transformer:
    """An opened model with its blocks in the parts that compute with them; `dtype` of activations.

    **Raises:** `CheckpointError` if there are none.
    """
    if not any(leaf.blocks is not None for _, leaf in leaves(model)):
        raise CheckpointError(
            "quantized=True keeps the 8-bit blocks (Q8_0) of a .gguf file, and here are none. Load "
            "without it, and take quantize.int8 of the model."
        )
    kinds = SplitProjection | StackedProjection | Einsum | Embedding | Vision
    return jax.tree.map(
        partial(_kept, dtype=dtype), model, is_leaf=lambda part: isinstance(part, kinds)
    )


def _kept(part: Any, dtype: np.dtype):
    match part:
        case SplitProjection(q=Einsum() as q, kv=Einsum() as kv) if _in_blocks(q, kv):
            return _joined(q, kv)
        case StackedProjection(qkv=Einsum() as qkv) if _in_blocks(qkv):
            return _joined(qkv)
        case SplitProjection() | StackedProjection():
            return jax.tree.map(
                partial(_kept, dtype=dtype), part, is_leaf=lambda one: isinstance(one, Einsum)
            )
        case Einsum() if _in_blocks(part):
            return _einsum(part)
        case Embedding() if _in_blocks(part):
            return GroupwiseEmbedding(
                _groups(part.weight.shape[:1], part), activations=jnp.dtype(dtype)
            )
    return part


def _in_blocks(*parts: Any) -> bool:
    return all(part.weight.blocks is not None for part in parts)


def _joined(*parts: Einsum) -> JoinedProjection:
    shapes = [_outputs(part) for part in parts]
    heads = [math.prod(shape[:-1]) for shape in shapes]
    shape = (sum(heads), shapes[0][-1])
    query_heads = heads[0] if len(parts) == 2 else heads[0] // 3
    qkv = GroupwiseEinsum(matrices=_matrices(*parts), eqn="...D,NHD->...NH", shape=shape)
    return JoinedProjection(qkv, query_heads=query_heads)


def _einsum(part: Einsum) -> GroupwiseEinsum | GroupwiseExperts:
    inputs, outputs = activation_axes(part.eqn), result_axes(part.eqn)
    if set(inputs) & set(outputs):
        axes = outputs + "".join(axis for axis in inputs if axis not in outputs)
        return GroupwiseExperts(
            weight=_groups(_outputs(part), part),
            eqn=f"...{inputs},{axes}->...{outputs}",
            axes=weight_axes(part.eqn),
        )
    return GroupwiseEinsum(matrices=_matrices(part), eqn=part.eqn, shape=_outputs(part))


def _outputs(part: Einsum) -> tuple[int, ...]:
    sizes = dict(zip(weight_axes(part.eqn), part.weight.shape, strict=True))
    return tuple(sizes[axis] for axis in result_axes(part.eqn))


def _matrices(*parts: Einsum) -> tuple[Int8Groups, ...]:
    """The rows of all parts under each other."""
    rows = [math.prod(_outputs(part)) for part in parts]
    inputs = math.prod(parts[0].weight.shape) // rows[0]
    cuts = [0, *column_cuts(inputs, GROUP), inputs]
    return tuple(
        _groups((sum(rows),), *parts, columns=slice(start, stop))
        for start, stop in zip(cuts, cuts[1:], strict=False)
    )


def _groups(
    outputs: tuple[int, ...], *parts: Einsum | Embedding, columns: slice | None = None
) -> Int8Groups:
    """Some columns of the rows of all parts, not read yet."""
    weights: list[Any] = [part.weight for part in parts]
    inputs = sum(math.prod(weight.shape) for weight in weights) // math.prod(outputs)
    columns = slice(0, inputs) if columns is None else columns
    groups = slice(columns.start // GROUP, columns.stop // GROUP)
    found = (
        _exactly(
            (*outputs, part.stop - part.start),
            dtype,
            lambda place=place, part=part: np.concatenate(
                [weight.blocks()[place] for weight in weights]
            )[:, part],
        )
        for place, (dtype, part) in enumerate(((np.int8, columns), (np.float16, groups)))
    )
    return Int8Groups(*found, group_size=GROUP)


def _exactly(shape: tuple[int, ...], dtype: type, read: Callable[[], np.ndarray]) -> Any:
    """A leaf that is read as it is stored."""

    def read_aligned(_: np.dtype) -> np.ndarray:
        out = aligned(shape, np.dtype(dtype))
        out[...] = read().reshape(shape)
        return out

    return Stored(shape, np.dtype(dtype), read_aligned, exact=True)
