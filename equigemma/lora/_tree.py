"""Where a model has einsums and adapters, and how to reach all of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax

from equigemma.lora._adapters import Adapter
from equigemma.nn import AbstractEinsum


def einsums(model: Any) -> list[tuple[str, AbstractEinsum]]:
    """Path and value of every einsum of a model, outermost where they are nested."""
    parts = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_einsum)
    return [(_name(path), part) for path, part in parts if _is_einsum(part)]


def adapters(model: Any) -> dict[str, Adapter]:
    """Path and value of every adapter, the outermost where they are nested."""
    return {path: part for path, part in einsums(model) if isinstance(part, Adapter)}


def replace(model: Any, new: Callable[[str, AbstractEinsum], AbstractEinsum]) -> Any:
    """The model with every einsum replaced by `new(path, einsum)`."""

    def at(path: Any, part: Any) -> Any:
        return new(_name(path), part) if _is_einsum(part) else part

    return jax.tree_util.tree_map_with_path(at, model, is_leaf=_is_einsum)


def trainable(model: Any) -> Any:
    """A tree of booleans, true at the arrays of adapters: for `eqx.partition` and `train.init`."""

    def mark(part: Any) -> Any:
        if not isinstance(part, Adapter):
            return False
        inner = jax.tree.map(lambda _: True, part)
        return eqx.tree_at(lambda adapter: adapter.base, inner, trainable(part.base))

    return jax.tree.map(mark, model, is_leaf=lambda part: isinstance(part, Adapter))


def split(model: Any) -> tuple[Any, Any]:
    """Adapters, and everything else: two halves for `eqx.combine`."""
    return eqx.partition(model, trainable(model))


def remove(model: Any) -> Any:
    """The model without its adapters, as it was before `add`."""

    def bare(path: str, einsum: AbstractEinsum) -> AbstractEinsum:
        return bare(path, einsum.base) if isinstance(einsum, Adapter) else einsum

    return replace(model, bare)


def transfer(adapted: Any, model: Any) -> Any:
    """`model` with the adapters of `adapted` around its own einsums.

    So adapters that were learned over 8-bit weights get back to the full ones.

    **Raises:** `ValueError` naming places of adapters that `model` does not have.
    """
    return put(adapters(adapted), model)


def put(found: Mapping[str, Adapter], model: Any) -> Any:
    """`model` with these adapters around the einsums at their paths."""
    if missing := sorted(found.keys() - dict(einsums(model)).keys()):
        raise ValueError(
            f"There are adapters for {', '.join(missing[:3])}, which the model does not have; it "
            f"is of another kind, or `prepare` has joined its projections."
        )

    def around(path: str, einsum: AbstractEinsum) -> AbstractEinsum:
        return based(found[path], einsum) if path in found else einsum

    def based(part: Any, einsum: AbstractEinsum) -> AbstractEinsum:
        # Adapters over adapters come along whole.
        if not isinstance(part, Adapter):
            return einsum
        return dataclasses.replace(part, base=based(part.base, einsum))

    return replace(model, around)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_einsum(part: Any) -> bool:
    return isinstance(part, AbstractEinsum)
