"""Partition specs of every leaf of a tree, and arrays placed by them."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from equigemma.sharding._axes import Axes, is_array, named_leaves
from equigemma.sharding._rules import Rules, as_rules


Tree = TypeVar("Tree")
SomeRules = Rules | Mapping[str, Any] | str | None


def specs(tree: Any, mesh: Mesh | AbstractMesh, rules: SomeRules = None) -> Any:
    """A `PartitionSpec` for every array of `tree`, in a tree of its structure; None for the rest.

    **Arguments:**

    - `tree`: a model in any form (with adapters, prepared, quantized, stacked), a state of
      training or of an optimizer, a cache, a batch; of arrays, or of shapes as `jax.eval_shape`
      gives them. An array in no module is one of a batch.
    - `mesh`: of devices, or an `AbstractMesh` of names and sizes.
    - `rules`: `Rules`, a mapping from letters of the axis legend to mesh axes, or the name of one
      of `PRESETS`. By default `rules_for(mesh)`.

    **Returns:** a tree of the structure of `tree`.

    **Raises:** `ValueError`, with the path of the leaf, for an axis that the mesh does not divide
    and that `rules` does not let be replicated, and for an array with fewer axes than are named.

    ```python
    >>> import equigemma as eg, equinox as eqx, jax
    >>> from jax.sharding import AbstractMesh
    >>> config = eg.variants.get("gemma3-4b")
    >>> model = eqx.filter_eval_shape(eg.Transformer, config, key=jax.random.key(0))
    >>> placed = eg.sharding.specs(model, AbstractMesh((8, 4), ("fsdp", "tensor")))
    >>> tuple(placed.layers[0].attention.projection.q.weight), tuple(placed.embedding.weight)
    (('tensor', 'fsdp', None), ('tensor', 'fsdp'))

    ```
    """
    rules = as_rules(rules, mesh)
    found = [
        _spec(path, leaf, axes, rules, mesh) if is_array(leaf) else None
        for path, leaf, axes in named_leaves(tree)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _spec(
    path: tuple, leaf: Any, axes: Axes, rules: Rules, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    shape = jax.numpy.shape(leaf)
    if len(axes) != len(shape):
        raise ValueError(
            f"{_name(path)} has the axes {' '.join(axes)}, and the array there has the shape "
            f"{shape}."
        )
    entries: list[tuple[str, ...]] = []
    for letters, size in zip(axes, shape, strict=True):
        free = [name for name in rules.mesh_axes(letters) if name not in sum(entries, ())]
        entries.append(_divided(path, letters, size, tuple(free), rules, mesh))
    return PartitionSpec(*map(_plain, entries))


def _divided(
    path: tuple,
    letters: str,
    size: int,
    names: tuple[str, ...],
    rules: Rules,
    mesh: Mesh | AbstractMesh,
) -> tuple[str, ...]:
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts == 0:
        return names
    if set(letters) & set(rules.may_replicate):
        return ()
    raise ValueError(
        f"{_name(path)} has {size} along {letters}, which the mesh axis {' and '.join(names)} of "
        f"{parts} does not divide. Choose another mesh, or let the axis be replicated: "
        f"Rules(..., may_replicate={rules.may_replicate + letters!r})."
    )


def _plain(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return names if len(names) > 1 else names[0] if names else None


def _name(path: tuple) -> str:
    return keystr(path, simple=True, separator=".") or "The array"


def shardings(tree: Any, mesh: Mesh, rules: SomeRules = None) -> Any:
    """`specs` as `NamedSharding`s, which `jax.device_put` and `jax.jit` take.

    **Arguments:** those of `specs`, for a mesh of devices.

    **Returns:** a tree of the structure of `tree`, None where there is no array.
    """
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(tree, mesh, rules),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def shard(tree: Tree, mesh: Mesh, rules: SomeRules = None) -> Tree:
    """`tree` with its arrays where `specs` says; within `jit`, constrained to be there.

    **Arguments:** those of `specs`, for a mesh of devices.

    **Returns:** a tree with the same values; outside of `jit` arrays are moved or copied.

    **Raises:** as `specs`.
    """
    return jax.tree.map(
        lambda leaf, sharding: leaf if sharding is None else _placed(leaf, sharding),
        tree,
        shardings(tree, mesh, rules),
    )


def _placed(leaf: Any, sharding: NamedSharding) -> Any:
    if not isinstance(leaf, Tracer):
        return jax.device_put(leaf, sharding)
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(leaf, sharding)
    return jax.lax.with_sharding_constraint(leaf, sharding)


def bytes_per_device(
    tree: Any, mesh: Mesh | AbstractMesh, rules: SomeRules = None
) -> dict[str, int]:
    """Bytes of `tree` on each device, by field of its root; `tree` may be of shapes.

    **Arguments:** those of `specs`.

    **Returns:** bytes by name of the field, such as `"layers"`; add them up for the whole.

    **Raises:** as `specs`.
    """
    rules, found = as_rules(rules, mesh), {}
    for path, leaf, axes in named_leaves(tree):
        if is_array(leaf):
            spec = _spec(path, leaf, axes, rules, mesh)
            name = keystr(path[:1], simple=True) or "array"
            found[name] = found.get(name, 0) + _bytes(leaf, spec, mesh)
    return found


def _bytes(leaf: Any, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> int:
    shape = NamedSharding(mesh, spec).shard_shape(jax.numpy.shape(leaf))
    return math.prod(shape) * jax.numpy.dtype(leaf.dtype).itemsize
