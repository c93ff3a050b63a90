"""Layers that repeat, as a loop over their weights: one compiled period, however many there are.

What makes one of a model is in `equigemma/stack.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import not_hoisted
from equigemma._typing import Array, Float, Int
from equigemma.config import ModelConfig
from equigemma.nn._attention import SequenceInfo
from equigemma.nn._block import AbstractBlock
from equigemma.nn._einsum import AbstractEinsum, AbstractExpertEinsum
from equigemma.nn._rope import SinCos
from equigemma.nn._stacked_einsum import StackedEinsum
from equigemma.nn._stream import split_stream
from equigemma.nn._summary import shallow_repr, summary


NOT_A_TUPLE = (
    "The layers of this model are stacked, so no layer can be had alone: take eg.unstack(model), "
    "and eg.stack of the result."
)


class Stacked(eqx.Module):
    """The layers of one period, of which every array has an axis for the periods in front; and the
    layers that remain.

    It is not a tuple of layers: whoever wants those is told how to get them.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    period: tuple[AbstractBlock, ...]
    rest: tuple[AbstractBlock, ...]

    def __call__(
        self, x: Float[Array, "..."], sequence: SequenceInfo, ropes: Mapping, config: ModelConfig
    ) -> Float[Array, "..."]:
        """The stream after all layers.

        **Arguments:**

        - `x`: the stream before the first layer.
        - `sequence`: positions and mask of the tokens, which all layers share.
        - `ropes`: sine and cosine by head size and `RopeConfig`.
        - `config`: that of the model.

        **Returns:** the stream, in the shape and dtype of `x`.
        """

        def through(x: Array, blocks: Any, layers: Any):
            for block, layer in zip(blocks, layers, strict=True):
                rope: SinCos = ropes[layer.attention.head_dim, layer.attention.rope]
                x, _ = block(x, sequence, rope)
                x = split_stream(x, sequence.positions)
            return x

        length, rest = len(self.period), len(self.rest)
        repeating, remaining = config.layers[:length], config.layers[len(config.layers) - rest :]

        def step(x: Array, numbered: tuple[Array, Any]):
            index, blocks = numbered
            blocks = jax.tree.map(partial(_only, index), blocks, self.period)
            return through(x, blocks, repeating), None

        with jax.named_scope("periods"):
            periods = len(jax.tree.leaves(self.period)[0])
            x, _ = jax.lax.scan(step, x, (jnp.arange(periods), self.period))
        with jax.named_scope("rest"):
            return through(x, self.rest, remaining)

    def one_by_one(self) -> tuple[AbstractBlock, ...]:
        """All layers, written out; their projections read the stacks, which are not copied."""
        periods = range(len(jax.tree.leaves(self.period)[0]))
        each = (
            jax.tree.map(partial(_at, index), self.period, is_leaf=_is_read_in_place)
            for index in periods
        )
        return (*(block for period in each for block in period), *self.rest)

    def map(self, function: Callable[[AbstractBlock], AbstractBlock]) -> "Stacked":
        """The same with another block around each."""
        return Stacked(tuple(map(function, self.period)), tuple(map(function, self.rest)))

    def __len__(self) -> int:
        raise TypeError(NOT_A_TUPLE)

    def __iter__(self) -> Iterator[AbstractBlock]:
        raise TypeError(NOT_A_TUPLE)

    def __getitem__(self, index: Any) -> AbstractBlock:
        raise TypeError(NOT_A_TUPLE)


def _is_read_in_place(part: Any) -> bool:
    """An einsum that is not made of others, as one with an adapter is."""
    if not isinstance(part, AbstractExpertEinsum):
        return False
    inner = jax.tree.leaves(part, is_leaf=lambda node: node is not part and _is_einsum(node))
    return not any(map(_is_einsum, inner))


def _is_einsum(node: Any) -> bool:
    return isinstance(node, AbstractEinsum)


def _at(index: int, part: Any) -> Any:
    return StackedEinsum(part, index) if _is_read_in_place(part) else part[index]


def _only(index: Int[Array, ""], part: Array, stack: Array) -> Array:
    """`part`, which is `stack[index]`, so that no other part of the stack is read for it."""
    return _sliced_late(part, stack, index) if part.dtype.itemsize == 2 else part


@jax.custom_jvp
def _sliced_late(part: Array, stack: Array, index: Int[Array, ""]) -> Array:
    """`stack[index]`; `part` is there for its derivative alone."""
    stack, index = not_hoisted(stack, until=index)
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


@_sliced_late.defjvp
def _derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # A scan stacks the gradients of parts. One of the stack would be added up whole in each step.
    return _sliced_late(*primals), tangents[0]


def check_unstacked(model: Any) -> None:
    """Refuses a stacked model.

    **Arguments:** `model`: a model, or any tree.

    **Raises:** `ValueError`.
    """
    parts = jax.tree.leaves(model, is_leaf=lambda part: isinstance(part, Stacked))
    if any(isinstance(part, Stacked) for part in parts):
        raise ValueError(NOT_A_TUPLE)
