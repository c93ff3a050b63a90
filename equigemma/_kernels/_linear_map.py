"""Linear maps with a given transpose, under every transformation of JAX.

`jax.custom_vjp` fixes the program of a backward pass and rules out forward mode. A `jax.custom_jvp`
rule made of these maps fixes it too: reverse mode transposes what the rule computes, and the
transpose of each map is the one that it was given.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from equigemma._typing import Array


_R = TypeVar("_R")
_X = TypeVar("_X")
_Y = TypeVar("_Y")
Leaves = Sequence[Any]
Flat = Callable[[Leaves, Leaves], list[Array]]


def linear_map(
    function: Callable[[_R, _X], _Y],
    transpose: Callable[[_R, _Y], _X],
    residuals: _R,
    x: _X,
    *,
    like: _Y,
) -> _Y:
    """`function(residuals, x)`, a map that is linear in `x` and has this transpose.

    Neither function may close over arrays. Derivatives with respect to `residuals`, and those of
    the transpose, are JAX's own: that is what second derivatives consist of.

    **Arguments:** `transpose`: from `residuals` and a cotangent of the result to one of `x`.
    `like`: a tree of the shapes and dtypes of the result. All its leaves are floats, as those of
    `x`.
    """
    fixed, residuals_tree = jax.tree.flatten(residuals)
    operands, x_tree = jax.tree.flatten(x)
    results, y_tree = jax.tree.flatten(like)

    def flat(fixed: Leaves, operands: Leaves) -> list[Array]:
        y = function(residuals_tree.unflatten(fixed), x_tree.unflatten(operands))
        return jax.tree.leaves(y)

    def flat_transpose(fixed: Leaves, cotangents: Leaves) -> list[Array]:
        dx = transpose(residuals_tree.unflatten(fixed), y_tree.unflatten(cotangents))
        return jax.tree.leaves(dx)

    types = tuple(map(jax.typeof, results))
    return y_tree.unflatten(_bind(flat, flat_transpose, fixed, operands, types))


def tangent_or_none(tangent: Any) -> Any:
    """A tangent as a rule with `symbolic_zeros` gets it; None where it is zero."""
    return None if isinstance(tangent, SymbolicZero) else tangent


def _bind(function: Flat, transpose: Flat, fixed: Leaves, operands: Leaves, types: tuple) -> list:
    rules = {"function": function, "transpose": transpose, "residuals": len(fixed), "types": types}
    return linear_map_p.bind(*fixed, *operands, **rules)


def _call(*arguments: Any, function: Flat, residuals: int, **_) -> list[Array]:
    return function(arguments[:residuals], arguments[residuals:])


def _jvp(
    primals: Leaves,
    tangents: Leaves,
    *,
    function: Flat,
    transpose: Flat,
    residuals: int,
    types: tuple,
):
    fixed, operands = primals[:residuals], primals[residuals:]
    moving = [at for at in range(residuals) if not isinstance(tangents[at], ad.Zero)]
    y, parts = _bind(function, transpose, fixed, operands, types), []
    if not all(isinstance(tangent, ad.Zero) for tangent in tangents[residuals:]):
        dx = [ad.instantiate_zeros(tangent) for tangent in tangents[residuals:]]
        parts.append(_bind(function, transpose, fixed, dx, types))
    if moving:

        def of_residuals(*moved: Array) -> list[Array]:
            given = dict(zip(moving, moved, strict=True))
            return function([given.get(at, leaf) for at, leaf in enumerate(fixed)], operands)

        at_and_along = [fixed[at] for at in moving], [tangents[at] for at in moving]
        parts.append(jax.jvp(of_residuals, *at_and_along)[1])
    return y, [sum(terms[1:], start=terms[0]) for terms in zip(*parts, strict=True)]


def _transpose(
    cotangents: Leaves, *arguments: Any, transpose: Flat, residuals: int, types: tuple, **_
) -> list:
    fixed, operands = arguments[:residuals], arguments[residuals:]
    given = [
        jnp.zeros(of.shape, of.dtype) if isinstance(cotangent, ad.Zero) else cotangent
        for cotangent, of in zip(cotangents, types, strict=True)
    ]
    dx = transpose(fixed, given)
    # An operand that is known here is a zero: a map linear in all of them leaves nothing else.
    return [None] * residuals + [
        _summed_over_devices(d, operand.aval) if ad.is_undefined_primal(operand) else None
        for d, operand in zip(dx, operands, strict=True)
    ]


def _summed_over_devices(cotangent: Array, aval: Any) -> Array:
    """Under `shard_map`, the cotangent of what is alike on all devices is a sum over them."""
    axes = tuple(sorted(_varying(jax.typeof(cotangent)) - _varying(aval)))
    return jax.lax.psum(cotangent, axes) if axes else cotangent


def _varying(aval: Any) -> frozenset:
    # The older name is that of jax before 0.10.
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying


def _batch(
    arguments: Leaves,
    axes: Sequence,
    *,
    function: Flat,
    transpose: Flat,
    residuals: int,
    types: tuple,
):
    arguments = [
        argument if axis is None else jnp.moveaxis(argument, axis, 0)
        for argument, axis in zip(arguments, axes, strict=True)
    ]
    fixed, operands = arguments[:residuals], arguments[residuals:]
    fronts = [None if axis is None else 0 for axis in axes]
    of_fixed, of_operands = fronts[:residuals], fronts[residuals:]

    def each(fixed: Leaves, operands: Leaves) -> list[Array]:
        return jax.vmap(function, (of_fixed, of_operands))(list(fixed), list(operands))

    def each_transpose(fixed: Leaves, cotangents: Leaves) -> list[Array]:
        dx = jax.vmap(transpose, (of_fixed, 0))(list(fixed), list(cotangents))
        return [
            d if front == 0 else d.sum(axis=0) for d, front in zip(dx, of_operands, strict=True)
        ]

    types = tuple(jax.make_jaxpr(each)(fixed, operands).out_avals)
    return _bind(each, each_transpose, fixed, operands, types), [0] * len(types)


linear_map_p = Primitive("linear_map")
linear_map_p.multiple_results = True
linear_map_p.def_impl(_call)
linear_map_p.def_abstract_eval(lambda *_, types, **__: list(types))
mlir.register_lowering(linear_map_p, mlir.lower_fun(_call, multiple_results=True))
ad.primitive_jvps[linear_map_p] = _jvp
ad.primitive_transposes[linear_map_p] = _transpose
batching.primitive_batchers[linear_map_p] = _batch
