"""Attribution by gradients: what patches would do, to first order and along a path."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import as_integer
from equigemma._typing import Array, ArrayLike, Float, Shaped
from equigemma.interpret._activations import activations
from equigemma.interpret._patch import patch
from equigemma.interpret._steering import Shift


Metric = Callable[[Any], Float[Array, ""]]
"""A model to a number, such as the difference of two logits on one prompt."""


def attribution(
    metric: Metric, model: eqx.Module, values: Mapping[str, Shaped[ArrayLike, "..."]]
) -> dict[str, Float[Array, "..."]]:
    """Attribution patching: for every number at every site, how the metric would change if it
    became that of `values`, to first order. One forward and one backward pass for all of them.

    Sum over the axes that are patched together: over the last one for a whole position.

    **Arguments:**

    - `metric`: on the prompt to be patched, usually the corrupted one.
    - `model`: that which `metric` is called with.
    - `values`: by site, from the other prompt, as `activations` gives them; of the shape they have
      in this one.

    **Returns:** by site `(value − own) · ∂metric/∂own`.

    **Raises:** as `patch`.

    **Source:** Nanda 2023, "Attribution Patching"; Syed et al. 2023, arXiv:2310.10348.
    """

    def shifted(shifts: dict[str, Array]) -> tuple[Float[Array, ""], dict[str, Array]]:
        changes = {name: Shift(shift) for name, shift in shifts.items()}

        def run(model: Any) -> tuple[Any, dict[str, Array]]:
            return activations(metric, model, list(values))

        return patch(run, model, changes)

    shifts = {name: jnp.zeros_like(jnp.asarray(value)) for name, value in values.items()}
    gradients, own = jax.grad(shifted, has_aux=True)(shifts)
    return {
        name: (jnp.asarray(value).astype(own[name].dtype) - own[name]) * gradients[name]
        for name, value in values.items()
    }


def integrated_gradients(
    metric: Metric,
    model: eqx.Module,
    site: str,
    value: Float[Array, "..."],
    baseline: Float[Array, "..."],
    *,
    steps: int = 16,
) -> Float[Array, "..."]:
    """How much each number of `value` at a site makes the metric differ from that at `baseline`.

    Gradients on the straight line between the two, at the points of Gauss and Legendre. They add up
    to `metric` of the one minus that of the other, up to the error of so many points.

    **Arguments:**

    - `metric`: a model to a number.
    - `model`: that which `metric` is called with.
    - `site`: name of the site, such as `layers.0.resid_post`.
    - `value`, `baseline`: what is put at the site, of its shape.
    - `steps`: points.

    **Returns:** one number for each of `value`, in its shape and dtype.

    **Raises:** as `patch`; `ValueError` if `steps < 1`.

    **Source:** Sundararajan et al. 2017, arXiv:1703.01365.
    """
    points, weights = np.polynomial.legendre.leggauss(as_integer("steps", steps, least=1))

    def gradient(part: Float[Array, ""]) -> Array:
        between = baseline + part.astype(value.dtype) * (value - baseline)
        return jax.grad(lambda x: patch(metric, model, {site: x}))(between)

    gradients = jax.lax.map(gradient, jnp.asarray((1 + points) / 2, value.dtype))
    mean = jnp.tensordot(jnp.asarray(weights / 2, value.dtype), gradients, axes=1)
    return (value - baseline) * mean
