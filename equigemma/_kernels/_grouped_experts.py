"""Products of experts whose weights are integers of eight or four bits, with scales for groups."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from equigemma._kernels._dense_experts import Dense
from equigemma._kernels._experts import expert_product
from equigemma._kernels._grouped import GroupedProduct, widened_groups
from equigemma._kernels._product import SMALL, call
from equigemma._typing import Array, Float, Float16, Float32, Int, Int8


FORWARD = "...D,FD->...F"


@dataclass(frozen=True)
class GroupedExperts:
    """A matrix of each expert, in the form of `GroupedProduct`."""

    bits: Literal[4, 8]
    group: int
    inputs: int
    eqn: str = FORWARD
    """That, or its transpose."""

    def __call__(
        self,
        x: Float[Array, "rows inputs"],
        weight: Int8[Array, "experts outputs bytes"],
        scale: Float16[Array, "experts outputs groups"],
        expert: Int[Array, " rows"],
    ) -> Float32[Array, "rows outputs"]:
        """`jnp.einsum("rd,rfd->rf", x, widened_groups(weight, scale, ...)[expert])`.

        **Arguments:** `expert`: which expert each row goes to; rows are sorted by it.
        """
        return expert_product(self, x, jnp.clip(expert, 0, len(weight) - 1), weight, scale)

    def one(self, x: Array, weight: Array, scale: Array) -> Array:
        if self.eqn == FORWARD:
            return GroupedProduct(self.bits, self.group, self.inputs, sliced=True)(x, weight, scale)
        return Dense(self.eqn).one(x, self._floats(x, weight, scale))

    def ragged(self, x: Array, expert: Array, weight: Array, scale: Array) -> Array:
        if 2 * len(x) <= len(weight):
            # The chosen alone become floats.
            chosen = self._floats(x, weight[expert], scale[expert])
            each = "zD,zFD->zF" if self.eqn == FORWARD else "zF,zFD->zD"
            return jnp.einsum(each, x, chosen, preferred_element_type=jnp.float32)
        return Dense(self.eqn).ragged(x, expert, self._floats(x, weight, scale))

    def has_kernel(self, x: Array, weight: Array, scale: Array) -> bool:
        known = self.group == 32 and scale.dtype == jnp.float16 and x.dtype.itemsize <= 4
        return known and self.eqn == FORWARD and weight[0].size >= SMALL

    def native(self, x: Array, expert: Array, weight: Array, scale: Array) -> Array:
        name, number = f"equigemma_experts_int{self.bits}_groups", expert.astype(jnp.int32)
        return call(name, x, weight, scale, number, outputs=weight.shape[1])

    def of_cotangent(self, cotangent: Array, expert: Array, weight: Array, scale: Array) -> Array:
        backward = replace(self, eqn=Dense(self.eqn).transposed())
        return expert_product(backward, cotangent, expert, weight, scale)

    def of_weight(self, like: Array, x: Array, expert: Array, weight: Any, tangent: Any) -> Array:
        integers, scale = weight

        def of_scale(scale: Array) -> Array:
            floats = self._floats(x, integers, scale)
            return expert_product(Dense(self.eqn), x, expert, floats)

        return jax.jvp(of_scale, (scale,), (tangent[1],))[1]

    def _floats(self, x: Array, weight: Array, scale: Array) -> Array:
        return widened_groups(weight, scale, self.bits, self.group, self.inputs).astype(x.dtype)
