"""The training objective: sums of a loss over a batch, and their gradient, whole or accumulated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._typing import Array, Float32


Loss = Callable[[Any, Any], tuple[Float32[Array, ""], Float32[Array, ""]]]
"""`loss(model, batch) -> (sum over the targets, sum of their weights)`."""

Sums = tuple[Float32[Array, ""], Float32[Array, ""]]


def sums_of(loss: Loss, model: Any, batch: Any) -> Sums:
    """`loss(model, batch)`, in float32.

    **Raises:** `ValueError` if it is not a pair of scalars, as that of a loss that returns a mean.
    """
    result = loss(model, batch)
    is_pair = isinstance(result, tuple | list) and len(result) == 2
    if not is_pair or not all(map(_is_scalar, result)):
        raise ValueError(
            f"A loss must return two scalars, the sum over the targets and the sum of their "
            f"weights; got {_kind(result)}. Where it returns a mean, return (mean, 1.0)."
        )
    total, weight = (jnp.asarray(part).astype(jnp.float32) for part in result)
    return total, weight


def _is_scalar(value: Any) -> bool:
    is_number = isinstance(value, jax.Array | np.ndarray | np.generic | int | float)
    return is_number and not jnp.ndim(value) and jnp.result_type(value).kind in "biufV"


def mean_of(sums: Sums) -> Float32[Array, ""]:
    """The mean over the weighted targets; 0 where there are none."""
    total, weight = sums
    return total / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)


class Objective(NamedTuple):
    """The loss of one batch as a function of what is trained."""

    loss: Loss
    frozen: Any
    batch: Any
    micro_batches: int

    def sums(self, trained: Any) -> Sums:
        """The loss and its weight. Differentiated, one micro-batch is in memory at a time."""
        if self.micro_batches == 1:
            return self._sums(trained, self.batch)
        # Kept for the backward pass: the micro-batches alone.
        sums = jax.remat(self._sums)
        zero = jnp.zeros((), jnp.float32)
        return jax.lax.scan(
            lambda carry, part: (jax.tree.map(jnp.add, carry, sums(trained, part)), None),
            (zero, zero),
            self._parts(),
        )[0]

    def mean(self, trained: Any) -> Float32[Array, ""]:
        """The mean loss over the weighted targets of the batch."""
        return mean_of(self.sums(trained))

    def gradient(self, trained: Any) -> tuple[Sums, Any]:
        """The loss, its weight, and the gradient of the loss (not of the mean)."""
        if self.micro_batches == 1:
            return self._gradient(trained, self.batch)
        zero = jnp.zeros((), jnp.float32)
        return jax.lax.scan(
            lambda carry, part: (jax.tree.map(jnp.add, carry, self._gradient(trained, part)), None),
            ((zero, zero), jax.tree.map(jnp.zeros_like, trained)),
            self._parts(),
        )[0]

    def _sums(self, trained: Any, batch: Any) -> Sums:
        return sums_of(self.loss, eqx.combine(trained, self.frozen), batch)

    def _gradient(self, trained: Any, batch: Any) -> tuple[Sums, Any]:
        (total, weight), gradient = jax.value_and_grad(self._sums, has_aux=True)(trained, batch)
        return (total, weight), gradient

    def _parts(self) -> Any:
        """The batch with a new first axis, that of the micro-batches."""

        def split(array: Any) -> Any:
            shape = jnp.shape(array)
            if not shape or shape[0] % self.micro_batches:
                raise ValueError(
                    f"micro_batches={self.micro_batches} must divide the first axis of every array "
                    f"of a batch, its rows; got an array of shape {list(shape)}."
                )
            return jnp.reshape(array, (self.micro_batches, -1, *shape[1:]))

        return jax.tree.map(split, self.batch)


def _kind(result: Any) -> str:
    if isinstance(result, tuple | list):
        parts = ", ".join(map(_kind, result))
        return f"({parts})"
    if isinstance(result, jax.Array):
        return f"{result.dtype.name}{list(result.shape)}"
    return type(result).__name__
