"""Named points of the forward pass that are the input or output of no other module."""

from typing import Any

import equinox as eqx

from equigemma._typing import Array, Float


class Tap(eqx.Module):
    """The identity, with a path of its own, at which `equigemma.interpret` reads and patches."""

    def __call__(self, x: Float[Array, "..."], inputs: Any = None) -> Float[Array, "..."]:
        """`x`. `inputs`, where there are such, say which tokens the rows of `x` are of."""
        del inputs
        return x
