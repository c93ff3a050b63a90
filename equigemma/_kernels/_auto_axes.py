"""Functions whose communication the compiler chooses, also where mesh axes are explicit.

On a mesh with explicit axes the sharding of an array is part of its type, and an operation with
several possible results refuses to choose one. Here such axes are automatic while a function runs,
and explicit again in its results.
"""

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


_F = TypeVar("_F", bound=Callable)
Placed = Callable[[dict[str, Any], Any], Any]
"""From the arguments of a function by name, and its result, to a tree of a `PartitionSpec` for each
leaf of the result, or one for several."""


def on_auto_axes(placed: Placed | None = None) -> Callable[[_F], _F]:
    """Decorates a function that runs with automatic mesh axes, and whose results are `placed`.

    Without arrays on explicit axes, and under `shard_map`, it is the function itself. None is for
    functions that are called outside of `jit` only: results are where the compiler left them.
    """

    def decorate(function: _F) -> _F:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            mesh = explicit_mesh((args, kwargs))
            if mesh is None:
                return function(*args, **kwargs)
            traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs)))
            run = _within_jit if traced else _outside_of_jit
            return run(function, args, kwargs, mesh, placed)

        return cast(_F, call)

    return decorate


def split_batch(x: jax.Array, axis: int = 0) -> jax.Array:
    """`x` with an axis split over the axes `data` and `fsdp` of the mesh that `jax.set_mesh` set.

    Where weights are split over `fsdp` too, the compiler would otherwise often gather the batch
    and split the width of activations. Without such a mesh, and where it does not divide the axis,
    it is `x` itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names)
    automatic = all(mesh.axis_types[mesh.axis_names.index(name)] == AxisType.Auto for name in names)
    parts = math.prod(mesh.shape[name] for name in names)
    if parts == 1 or not automatic or x.shape[axis] % parts:
        return x
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = names
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def explicit_mesh(tree: Any) -> Any:
    """The mesh of the first array of `tree` on explicit axes; None where there is none."""
    for leaf in _arrays(tree):
        if (mesh := _mesh_of(leaf)) is not None:
            types = set(mesh.axis_types)
            if AxisType.Explicit in types and AxisType.Manual not in types:
                return mesh
    return None


def spec_of(leaf: Any) -> PartitionSpec:
    """How an array is split over explicit axes; an empty spec if it is not."""
    known = isinstance(leaf, jax.Array) and _mesh_of(leaf) is not None
    return jax.typeof(leaf).sharding.spec if known else PartitionSpec()


def _mesh_of(leaf: jax.Array) -> Any:
    mesh = jax.typeof(leaf).sharding.mesh
    return None if mesh.empty else mesh


def _within_jit(function: Callable, args: tuple, kwargs: dict, mesh: Any, placed: Placed | None):
    assert placed is not None, "a function that takes no traced arrays"
    automatic = mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(automatic):
        inner = _map(lambda leaf: jax.sharding.reshard(leaf, PartitionSpec()), (args, kwargs))
        result = function(*inner[0], **inner[1])
    specs = _for_each_leaf(placed(_named(function, args, kwargs), result), result)
    with jax.sharding.use_abstract_mesh(mesh):
        return _map(jax.sharding.reshard, result, specs)


def _outside_of_jit(function: Callable, args: tuple, kwargs: dict, mesh: Any, placed: Any):
    # Arrays on another kind of axes are other objects with the same buffers.
    (concrete, *_) = filter(None, map(_named_sharding, _arrays((args, kwargs))))
    devices = concrete.mesh.devices
    assert devices is not None, "arrays outside of jit are on devices"
    automatic, explicit = (
        jax.sharding.Mesh(devices, mesh.axis_names, axis_types=types)
        for types in ((AxisType.Auto,) * len(mesh.axis_names), mesh.axis_types)
    )

    def moved(leaf: jax.Array, to: Any, spec: PartitionSpec | None = None) -> jax.Array:
        sharding = _named_sharding(leaf)
        if sharding is None:
            return leaf
        return jax.device_put(leaf, NamedSharding(to, sharding.spec if spec is None else spec))

    with jax.set_mesh(automatic):
        inner = _map(lambda leaf: moved(leaf, automatic), (args, kwargs))
        result = function(*inner[0], **inner[1])
    if placed is None:
        return _map(lambda leaf: moved(leaf, explicit), result)
    specs = _for_each_leaf(placed(_named(function, args, kwargs), result), result)
    return _map(lambda leaf, spec: moved(leaf, explicit, spec), result, specs)


def _named(function: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    return inspect.signature(function).bind(*args, **kwargs).arguments


def _arrays(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _named_sharding(leaf: jax.Array) -> NamedSharding | None:
    return leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None


def _map(function: Callable, tree: Any, *others: Any) -> Any:
    """`function` of the arrays of a tree; other leaves stay."""

    def one(leaf: Any, *other: Any) -> Any:
        return function(leaf, *other) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(one, tree, *others)


def _for_each_leaf(specs: Any, result: Any) -> Any:
    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda leaf: PartitionSpec(*spec[: np.ndim(leaf)]), part),
        specs,
        result,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
