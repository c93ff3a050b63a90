"""The one place where a weight meets an activation.

A projection is a weight with the equation it is used in. Everything that changes how weights are
held (adapters, 8-bit forms, fused layouts) is another `AbstractEinsum`; no module above asks which.
"""

import math
from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, PRNGKeyArray


class AbstractEinsum(eqx.Module):
    """A linear map on the last axes of an activation, given by an einsum equation.

    `eqn` reads `"...D,NDH->...NH"`: activation, weight, result, in the letters of the axis legend.
    """

    eqn: eqx.AbstractVar[str]

    @abstractmethod
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The map applied to `x`, in the dtype of `x`."""


class Einsum(AbstractEinsum):
    """A dense weight.

    Products accumulate in float32 and are rounded once to the dtype of the activation.
    """

    weight: Float[Array, "..."]
    eqn: str = eqx.field(static=True)

    def __init__(self, eqn: str, shape: tuple[int, ...], *, key: PRNGKeyArray, dtype: jnp.dtype):
        contracted = set(weight_axes(eqn)) - set(result_axes(eqn))
        fan_in = math.prod(
            size for axis, size in zip(weight_axes(eqn), shape, strict=True) if axis in contracted
        )
        self.weight = jax.random.normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)
        self.eqn = eqn

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return contract(self.eqn, x, self.weight)


def weight_axes(eqn: str) -> str:
    """The letters of the weight: `"...D,NDH->...NH"` gives `"NDH"`."""
    return eqn.split("->")[0].split(",")[1]


def result_axes(eqn: str) -> str:
    """The letters of the result without its batch: `"...D,NDH->...NH"` gives `"NH"`."""
    return eqn.split("->")[1].removeprefix("...")


def contract(
    eqn: str,
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
    dtype: jnp.dtype | type | None = None,
) -> Float[Array, "..."]:
    """`einsum(eqn, x, weight)`, accumulated in float32, in `dtype` (by default that of `x`).

    A weight stored in another dtype is converted to that of `x`, never the other way round.
    """
    # On CPU, bfloat16 with a float32 result has a fast path for many rows and a very slow one for a
    # single row; without the request XLA accumulates a single row in float32 all the same.
    rows = math.prod(x.shape[: x.ndim - len(eqn.split(",")[0].removeprefix("..."))])
    accumulator = None if rows == 1 else jnp.float32
    product = jnp.einsum(eqn, x, weight.astype(x.dtype), preferred_element_type=accumulator)
    return product.astype(x.dtype if dtype is None else dtype)
