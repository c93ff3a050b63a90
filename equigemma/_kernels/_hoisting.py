"""A barrier against hoisting: what depends on a step of a loop stays in it."""

from typing import TypeVar

import jax


_Value = TypeVar("_Value")
_Step = TypeVar("_Step")


def not_hoisted(value: _Value, *, until: _Step) -> tuple[_Value, _Step]:
    """`value, until`, of which XLA does not know that `value` is there before `until` is.

    What is alike in every step of a loop is computed before it, and kept. XLA on CPU reads a slice,
    or a few rows, of bfloat16 or integers by way of float32: of weights that a loop reads in parts
    it would convert the whole beforehand. Seen with jax 0.8.1, 0.10.2 and 0.12.0.1.

    **Arguments:** trees of arrays. `until`: what differs from step to step.
    """
    return jax.lax.optimization_barrier((value, until))
