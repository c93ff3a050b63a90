"""Implementations of primitives outside of `jax.jit`."""

from collections.abc import Callable
from typing import Any

import jax


def always_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which `jax.jit` made, compiled under `jax.disable_jit` too.

    One that binds the primitive whose implementation it is would call itself without end there.
    """

    def call(*operands: Any, **parameters: Any) -> Any:
        with jax.disable_jit(False):
            return function(*operands, **parameters)

    return call
