"""Reshapes that know their own inverse, written as axes: `"(N H) D -> N D H"`.

The left side is how somebody else stores a weight, the right side how we do; parentheses merge.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class Axes:
    """One reshape; an empty pattern changes nothing. Arrays may be numpy's or JAX's."""

    pattern: str = ""

    def theirs_shape(self, ours_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape on their side of a weight that has `ours_shape` on ours."""
        if not self.pattern:
            return ours_shape
        sizes = self._sizes(ours_shape)
        return tuple(prod(sizes[axis] for axis in group) for group in self._theirs)

    def to_ours(self, array: Any, ours_shape: tuple[int, ...]) -> Any:
        """Their array in our layout."""
        if not self.pattern:
            return array
        sizes = self._sizes(ours_shape)
        flat = [axis for group in self._theirs for axis in group]
        split = array.reshape(tuple(sizes[axis] for axis in flat))
        return split.transpose(tuple(flat.index(axis) for axis in self._ours))

    def to_theirs(self, array: Any) -> Any:
        """Our array in their layout."""
        if not self.pattern:
            return array
        flat = [axis for group in self._theirs for axis in group]
        ordered = array.transpose(tuple(self._ours.index(axis) for axis in flat))
        return ordered.reshape(self.theirs_shape(array.shape))

    @property
    def _theirs(self) -> list[list[str]]:
        left = self.pattern.split("->")[0]
        return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", left)]

    @property
    def _ours(self) -> list[str]:
        return self.pattern.split("->")[1].split()

    def _sizes(self, ours_shape: tuple[int, ...]) -> Mapping[str, int]:
        return dict(zip(self._ours, ours_shape, strict=True))
