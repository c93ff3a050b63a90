"""The letters of every array of a tree, from equations and annotations."""

import dataclasses
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.tree_util import GetAttrKey, tree_flatten_with_path

from equigemma._kernels import activation_axes, result_axes, weight_axes
from equigemma._prepare import MatrixEinsum
from equigemma.lora import DoRAEinsum, LoRAEinsum
from equigemma.lora._adapters import factor_axes
from equigemma.nn import AbstractEinsum, Affine, Einsum, LayerNorm, RMSNorm
from equigemma.quantize import (
    GroupwiseEinsum,
    GroupwiseEmbedding,
    GroupwiseExperts,
    Int4Groups,
    Int8Einsum,
    Int8Experts,
    Int8Groups,
)


Axes = tuple[str, ...]
"""One entry for each axis of an array: its letter, those of axes merged into it, or none. `BATCH`
stands for any number of axes."""

BATCH = "*B"
OF_A_BATCH: Axes = (BATCH,)
WHOLE: Axes = ("*",)


def named_leaves(
    node: Any, axes: Axes = OF_A_BATCH, path: tuple = ()
) -> Iterator[tuple[tuple, Any, Axes]]:
    """Path, leaf and axes of every leaf of a tree, in the order of `jax.tree.leaves`.

    An array that is in no module is taken as one of a batch, but in a named tuple, as the states of
    optimizers are, as one without named axes.
    """
    children, _ = tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    for key, child in children:
        if not key:
            yield path, child, _of_rank(axes, np.ndim(child))
        else:
            yield from named_leaves(child, _of_child(node, key[0], axes), (*path, *key))


def _of_rank(axes: Axes, rank: int) -> Axes:
    """`axes` for an array of so many; those in front that are not named, as of stacked layers, are
    without a letter. Of fewer axes than letters nothing is known: all letters are returned.
    """
    if not axes or axes[0] not in (BATCH, *WHOLE):
        return ("",) * (rank - len(axes)) + axes
    count = rank - len(axes) + 1
    first = "B" if axes[0] == BATCH else ""
    return ((first, *[""] * (count - 1)) if count > 0 else ()) + axes[1:]


def _of_child(node: Any, key: Any, axes: Axes) -> Axes:
    if isinstance(node, Int8Groups | Int4Groups) or not isinstance(node, eqx.Module):
        return WHOLE if hasattr(node, "_fields") else axes
    assert isinstance(key, GetAttrKey)
    return _of_einsum(node, key.name) or _annotated(type(node)).get(key.name, WHOLE)


def _of_einsum(module: eqx.Module, name: str) -> Axes | None:
    """The axes of a field that follow from an equation."""
    if isinstance(module, Affine):
        return tuple(result_axes(module.linear.eqn)) if name == "bias" else None
    if isinstance(module, GroupwiseEmbedding):
        return ("V", "D")
    if isinstance(module, RMSNorm | LayerNorm):
        return WHOLE  # of any axis, also that of a head; and too small to be worth a collective
    if not isinstance(module, AbstractEinsum):
        return None
    eqn = module.eqn
    outputs = result_axes(eqn)
    inputs = "".join(axis for axis in activation_axes(eqn) if axis not in outputs)
    match module, name:
        case Einsum(), "weight":
            return tuple(weight_axes(eqn))
        case LoRAEinsum() | DoRAEinsum(), "down" | "up":
            return tuple(factor_axes(eqn)[name == "up"].replace("r", " "))
        case DoRAEinsum(), "magnitude":
            return tuple(outputs)
        case MatrixEinsum() | Int8Einsum() | GroupwiseEinsum(), _:
            return (outputs,) if name == "scale" else (outputs, inputs)
        case Int8Experts() | GroupwiseExperts(), _:
            return tuple(outputs) if name == "scale" else (*outputs, inputs)
    return None


@cache
def _annotated(kind: type[eqx.Module]) -> dict[str, Axes]:
    """The axes of the fields of a class that are annotated with them."""
    found = {field.name: _dimensions(field.type) for field in dataclasses.fields(kind)}
    return {name: axes for name, axes in found.items() if axes is not None}


def _dimensions(hint: Any) -> Axes | None:
    if isinstance(text := getattr(hint, "dim_str", None), str):
        words = text.split()
        return tuple(word if word == BATCH or len(word) == 1 else "" for word in words)
    return next(filter(None, map(_dimensions, typing.get_args(hint))), None)


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape, also without values."""
    return eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
