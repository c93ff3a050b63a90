"""The one place where a weight meets an activation.

A projection is a weight with the equation it is used in. Everything that changes how weights are
held (adapters, 8-bit forms, fused layouts) is another `AbstractEinsum`; no module above asks which.
"""

import math
from abc import abstractmethod
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import (
    activation_axes,
    contract,
    contract_experts,
    each_block,
    result_axes,
    weight_axes,
)
from equigemma._typing import Array, Float, Int, PRNGKeyArray
from equigemma.nn._init import random_weight


class AbstractEinsum(eqx.Module):
    """A linear map on the last axes of an activation, given by an einsum equation.

    `eqn` reads `"...D,NDH->...NH"`: activation, weight, result, in the letters of the axis legend.
    """

    eqn: eqx.AbstractVar[str]

    @abstractmethod
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The map applied to `x`.

        **Arguments:** `x`: with the axes of the equation's activation, after any others.

        **Returns:** the result, with those of the equation's result in their place, in the dtype of
        `x`.
        """


class AbstractExpertEinsum(AbstractEinsum):
    """An einsum that can be a projection of a mixture of experts.

    Then activation, weight and result have the axis of experts in `eqn`, as in
    `"...ED,ECFD->...ECF"`, and every array of the module has it in front.
    """

    @abstractmethod
    def by_expert(
        self, x: Float[Array, "rows ..."], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows ..."]:
        """Each row through the weight of its expert alone; rows are sorted by expert.

        **Arguments:** `x`: without the axis of experts, as the result is.
        """


class Einsum(AbstractExpertEinsum):
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

    def by_expert(
        self, x: Float[Array, "rows ..."], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows ..."]:
        return contract_experts(one_expert(self.eqn), x, self.weight, expert)


def by_expert(
    einsum: AbstractEinsum, x: Float[Array, "rows ..."], expert: Int[Array, " rows"]
) -> Float[Array, "rows ..."]:
    """`einsum.by_expert(x, expert)`, also for einsums that only have a call, in a loop over blocks.

    **Arguments:**

    - `einsum`: with an axis of experts.
    - `x`: without the axis of experts.
    - `expert`: of each row, in ascending order.

    **Returns:** the result of each row by its expert, without the axis of experts.
    """
    if isinstance(einsum, AbstractExpertEinsum):
        return einsum.by_expert(x, expert)
    arrays, rest = eqx.partition(einsum, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    # Differentiation slices an expert's weights anew, rather than keep them for each block.
    @partial(jax.checkpoint, prevent_cse=False)
    def one(rows: Array, *slices: Array) -> Array:
        arrays = jax.tree.unflatten(structure, [part[None] for part in slices])
        return eqx.combine(arrays, rest)(rows[:, None])[:, 0]

    return each_block(one, x, expert, *leaves)


def one_expert(eqn: str) -> str:
    """The equation of one expert: `"...ED,ECFD->...ECF"` gives `"...D,CFD->...CF"`.

    **Arguments:** `eqn`: of all experts.

    **Returns:** the equation without the axis that activation and result share.
    """
    shared = set(activation_axes(eqn)) & set(result_axes(eqn))
    return "".join(letter for letter in eqn if letter not in shared)
