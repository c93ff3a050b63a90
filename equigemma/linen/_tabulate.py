"""A table of parameters, module by module."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def tabulate(params: Mapping[str, Any], depth: int | None) -> str:
    """One line for each module: its path, its parameters with dtype and shape, and their number.

    **Arguments:** `params`: DeepMind's tree, of arrays or of `jax.ShapeDtypeStruct`s. `depth`:
    modules further down are counted with those above them; None shows all.
    """
    modules: dict[str, list[tuple[str, Any]]] = {}
    for path, leaf in _leaves(params, ()):
        module = path[:-1] if depth is None else path[:-1][:depth]
        modules.setdefault("/".join(module), []).append(("/".join(path[len(module) :]), leaf))
    rows = [("path", "params", "size")]
    for module, leaves in modules.items():
        sizes = [int(np.prod(leaf.shape)) for _, leaf in leaves]
        shown = [f"{name}: {leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves]
        if len(shown) > 4:
            shown = [f"{len(shown)} arrays"]
        rows.append((module, ", ".join(shown), f"{sum(sizes):,}"))
    total = sum(int(np.prod(leaf.shape)) for _, leaf in _leaves(params, ()))
    size = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for _, leaf in _leaves(params, ()))
    rows.append(("total", f"{size / 1e9:.3g} GB", f"{total:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{path:{widths[0]}}  {what:{widths[1]}}  {count:>{widths[2]}}"
        for path, what, count in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]]) + "\n"


def _leaves(
    tree: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value
