"""The one place where a weight meets an activation.

A projection is a weight with the equation it is used in. Everything that changes how weights are
held (adapters, 8-bit forms, fused layouts) is another `AbstractEinsum`; no module above asks which.
"""

import math
from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp

from equigemma._kernels import contract, result_axes, weight_axes
from equigemma._typing import Array, Float, PRNGKeyArray
from equigemma.nn._init import random_weight


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
        self.weight = random_weight(key, shape, fan_in**-0.5, dtype)
        self.eqn = eqn

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return contract(self.eqn, x, self.weight)
