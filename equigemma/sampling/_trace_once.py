"""Layers of one kind are traced once for a program, however many there are."""

from functools import partial
from typing import Any

import equinox as eqx
import jax

from equigemma._typing import Array, Float
from equigemma.nn import AbstractBlock, AbstractKVCache, SequenceInfo, SinCos, Stacked, Transformer


def trace_once(model: Transformer) -> Transformer:
    """The model, to be called within `jax.jit`, each kind of layer of which is traced once.

    A layer's kind is its static fields with the shapes and dtypes of its arrays. What was recorded
    of the first is written out again for the others: the program is the same, operation by
    operation. What looks into a layer while it is traced sees the first of its kind only.
    """
    each = model.layers
    if isinstance(each, Stacked):
        each = each.one_by_one()
    layers = tuple(_TracedOnce(layer) for layer in each)
    return eqx.tree_at(lambda m: m.layers, model, layers)


class _TracedOnce(AbstractBlock):
    block: Any

    def __call__(
        self,
        x: Float[Array, "..."],
        sequence: SequenceInfo,
        rope: SinCos,
        cache: AbstractKVCache | None = None,
        per_layer_input: Float[Array, "*B L P"] | None = None,
    ) -> Any:
        """The block's output."""
        return _call(self.block, x, sequence, rope, cache, per_layer_input)


# Not inlined, a layer would be compiled as a function, with other roundings of the stream.
@partial(jax.jit, inline=True)
def _call(block: Any, *arguments: Any) -> Any:
    return block(*arguments)
