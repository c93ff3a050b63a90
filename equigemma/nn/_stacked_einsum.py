"""One of the einsums of a stack, whose weight is read within the stack."""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import activation_axes, few_rows, read_in_place, result_axes
from equigemma._typing import Array, Float, Int
from equigemma.nn._einsum import AbstractExpertEinsum


class StackedEinsum(AbstractExpertEinsum):
    """Einsum number `index` of those whose arrays are stacked in `stack`.

    A slice of a stack is a copy wherever a product does not read it in place. For few rows, as in
    decoding, copying takes longer than the product: they go through the stack as through a mixture
    of experts of which all rows choose the same one.
    """

    stack: AbstractExpertEinsum
    index: Int[Array, ""]
    eqn: str = eqx.field(static=True)

    def __init__(self, stack: AbstractExpertEinsum, index: int):
        # An array: layers of one kind are traced once.
        self.stack, self.index, self.eqn = stack, jnp.asarray(index, jnp.int32), stack.eqn

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        inputs = activation_axes(self.eqn)
        batch, each = x.shape[: x.ndim - len(inputs)], x.shape[x.ndim - len(inputs) :]
        rows = x.reshape(-1, *each)
        if set(inputs) & set(result_axes(self.eqn)) or not few_rows(len(rows)):
            return self._sliced(x)

        def in_place(rows: Array) -> Array:
            return self.stack.by_expert(rows, jnp.broadcast_to(self.index, len(rows)))

        def sliced(rows: Array) -> Array:
            return self._sliced(rows)

        product = read_in_place(rows, in_place, sliced)
        return product.reshape(*batch, *product.shape[1:])

    def by_expert(
        self, x: Float[Array, "rows ..."], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows ..."]:
        experts = jax.tree.leaves(self.stack)[0].shape[1]
        if not few_rows(len(x), experts):
            return self._sliced.by_expert(x, expert)
        # The experts of all layers are as many experts of one.
        joined = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.stack)
        return joined.by_expert(x, expert + self.index * experts)

    @property
    def _sliced(self) -> AbstractExpertEinsum:
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.index, keepdims=False), self.stack
        )
