"""Activation patching over a grid of layers, positions and heads, as one vectorised program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import as_integer
from equigemma._typing import Array, Bool, Float, Shaped
from equigemma.interpret._change import at
from equigemma.interpret._patch import patch


def sweep(
    metric: Callable[[Any], Float[Array, ""]],
    model: eqx.Module,
    values: Mapping[str, Shaped[Array, "..."]],
    *,
    positions: Sequence[int],
    heads: Sequence[int] | None = None,
    batch: int = 8,
    progress: bool = False,
) -> Float[np.ndarray, "..."]:
    """The metric of the model with one value patched, for each site, position and head.

    All are patched by the same program, compiled once, some of them at a time.

    **Arguments:**

    - `metric`: a model to a number, on the prompt to be patched.
    - `model`: that which `metric` is called with.
    - `values`: by site, usually one in each layer, from the other prompt, as `activations` gives
      them.
    - `positions`, `heads`: which ones, each by itself; without `heads` all of them at once.
    - `batch`: how many runs are vectorised, and so how much memory it takes.
    - `progress`: show a bar, which needs `rich`.

    **Returns:** `[sites positions]`, or `[sites positions heads]`.

    **Raises:** as `patch`; `ValueError` if `batch < 1`.
    """
    batch = as_integer("batch", batch, least=1)
    axes = [range(len(values)), positions, *([] if heads is None else [heads])]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.int32)
    points = grid.reshape(-1, len(axes))
    count = len(points)
    # The last batch is filled up with copies, so that it is of the shape of the others.
    points = np.concatenate([points, np.repeat(points[-1:], -count % batch, axis=0)])

    @eqx.filter_jit
    def run(model: eqx.Module, values: Mapping[str, Array], points: Array) -> Array:
        return jax.vmap(lambda point: _one(metric, model, values, point))(points)

    starts = range(0, len(points), batch)
    results = [
        np.asarray(run(model, dict(values), jnp.asarray(points[start : start + batch])))
        for start in (_with_bar(starts) if progress else starts)
    ]
    return np.concatenate(results)[:count].reshape(grid.shape[:-1])


def _one(
    metric: Callable[[Any], Array], model: eqx.Module, values: Mapping[str, Array], point: Array
) -> Array:
    """Every site has a change, which is one where it is this site's turn."""
    position, head = point[1], point[2] if len(point) > 2 else None
    changes = {
        name: at(_If(point[0] == number, jnp.asarray(value)), positions=position, heads=head)
        for number, (name, value) in enumerate(values.items())
    }
    return patch(metric, model, changes)


class _If(eqx.Module):
    """A value, if the condition holds."""

    condition: Bool[Array, ""]
    value: Array

    def __call__(self, x: Array) -> Array:
        new = jnp.broadcast_to(self.value.astype(x.dtype), x.shape)
        return jnp.where(self.condition, new, x)


def _with_bar(starts: range) -> Any:
    try:
        from rich.progress import track
    except ImportError as error:
        raise ImportError("progress=True needs rich: pip install rich") from error
    return track(starts, description="patching")


def plot(scores: Float[np.ndarray, "sites positions"], tokens: Sequence[str] | None = None) -> Any:
    """A picture of the result of `sweep`: sites from top to bottom, positions from left to right.

    **Arguments:**

    - `scores`: what `sweep` returns without `heads`.
    - `tokens`: what is written below the columns.

    **Returns:** the axes of matplotlib, which it needs.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    axes = pyplot.subplots()[1]
    largest = np.abs(scores).max()
    image = axes.imshow(scores, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    axes.figure.colorbar(image)
    axes.set_xlabel("position")
    axes.set_ylabel("site")
    if tokens is not None:
        axes.set_xticks(range(len(tokens)), tokens, rotation=90)
    return axes
