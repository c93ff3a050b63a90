"""Shape checks that teach: each failure names the argument, the axis, and both sizes.

jaxtyping checks the same shapes inside, but says what an annotation demands rather than who
disagrees with whom. These run where shapes are known without values, so under `jit` only while
tracing, and jaxtyping's switch turns them off too.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import config as _jaxtyping


_KINDS = {"int": jnp.integer, "bool": jnp.bool_, "float": jnp.floating, "uint8": jnp.uint8}


class Sizes:
    """Sizes of named axes, and who said so first."""

    def __init__(self, known: Mapping[str, tuple[tuple[int, ...], str]] | None = None):
        self._known = dict(known or {})

    def given(self, source: str, **sizes: int) -> "Sizes":
        """The same with more axes known, for example from a config."""
        return Sizes(self._known | {axis: ((size,), source) for axis, size in sizes.items()})

    def __getitem__(self, axis: str) -> int:
        """The size of a known axis."""
        return math.prod(self._known[axis][0])

    def expect(self, name: str, array: Any, kind: str, axes: str) -> None:
        """Checks kind, rank and known sizes of `array`, and learns the others.

        **Arguments:** `axes`: letters of the legend; the first may be `*B`, any number of axes.

        **Raises:** `TypeError` for something else than an array of that kind, else `ValueError`.
        """
        if _jaxtyping.jaxtyping_disable:
            return
        expected = f"{kind}[{axes}]"
        if not isinstance(array, jax.Array):
            raise TypeError(f"`{name}` must be an array {expected}, got a {type(array).__name__}.")
        got = f"{array.dtype}{list(array.shape)}"
        if not jnp.issubdtype(array.dtype, _KINDS[kind]):
            raise TypeError(f"`{name}` must be {expected}, got {got}.")
        for axis, sizes in _split(name, array.shape, axes, expected, got):
            known, source = self._known.setdefault(axis, (sizes, f"`{name}`"))
            if sizes != known:
                raise ValueError(
                    f"`{name}` is {got} and must be {expected}: its axis {axis} is {_show(sizes)}, "
                    f"but {source} has {axis} = {_show(known)}."
                )


def _split(
    name: str, shape: tuple[int, ...], axes: str, expected: str, got: str
) -> list[tuple[str, tuple[int, ...]]]:
    first, *rest = axes.split()
    if not first.startswith("*"):
        first, rest = "", [first, *rest]
    batch = len(shape) - len(rest)
    if batch < 0 or (batch > 0 and not first):
        raise ValueError(
            f"`{name}` must be {expected}, that is {'at least ' * bool(first)}{len(rest)} axes; "
            f"got {got}, {len(shape)} axes."
        )
    sizes = [(axis, (size,)) for axis, size in zip(rest, shape[batch:], strict=True)]
    return [(first, shape[:batch]), *sizes] if first else sizes


def _show(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else str(list(sizes))
