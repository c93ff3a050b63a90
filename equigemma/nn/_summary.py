"""Modules in one line, also within the error messages of jaxtyping: how large, and of what dtype.

Equinox would print every array. `wadler_lindig.pprint(module, respect_pdoc=False)` still does.
"""

from dataclasses import fields
from typing import Any

import equinox as eqx
import jax
import numpy as np
from wadler_lindig import AbstractDoc, TextDoc


def sizes(tree: Any) -> str:
    """How many parameters a tree has, and their dtypes."""
    arrays = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    ]
    dtypes = " and ".join(sorted({array.dtype.name for array in arrays})) or "no arrays"
    return f"{sum(array.size for array in arrays):,} parameters, {dtypes}"


def summary(self: eqx.Module, **options: Any) -> AbstractDoc:
    """One line, as the `__pdoc__` of a module that holds others."""
    return TextDoc(f"{type(self).__name__}({sizes(self)})")


def shallow_repr(self: eqx.Module) -> str:
    """One line for each part, as the `__repr__` of such a module."""
    parts = {field.name: getattr(self, field.name) for field in fields(self)}
    lines = [
        f"  {name}={eqx.tree_pformat(part, width=10_000)},\n"
        for name, part in parts.items()
        if part is not None
    ]
    return f"{type(self).__name__}(\n{''.join(lines)})"


def repr_doc(self: Any, **options: Any) -> AbstractDoc:
    """What `repr` gives, as the `__pdoc__` of anything that has a short one."""
    return TextDoc(repr(self))
