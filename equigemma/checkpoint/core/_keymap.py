"""Two-way rules between our leaves and the named arrays of some other format.

A rule is a pair of names with the reshape between them. `plan` proves that a set of rules fits a
model and a set of names: every leaf set once, every name used once or ignored for a stated reason,
all shapes equal. What is done along a plan, reading or writing, is up to the format.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from equigemma.checkpoint.core._axes import Axes
from equigemma.checkpoint.core._errors import CheckpointError


@dataclass(frozen=True)
class Rule:
    """`ours` and `theirs` name the same weight; `{i}` stands for a number, the same on both sides.

    Several names in `theirs` are stacked along a new first axis of ours. `axes` is the reshape of
    each part, `"theirs -> ours"`. `offset` is what their numbers are larger by.
    """

    ours: str
    theirs: str | tuple[str, ...]
    axes: str = ""
    offset: float = 0.0


@dataclass(frozen=True)
class Ignore:
    """Names of theirs that we do not need, and why; `*` stands for anything."""

    theirs: str
    reason: str


@dataclass(frozen=True)
class Assignment:
    """One leaf of ours and where it comes from."""

    path: str
    keys: tuple[str, ...]
    rule: Rule
    shape: tuple[int, ...]

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Our shape of what one key holds."""
        return self.shape if isinstance(self.rule.theirs, str) else self.shape[1:]

    @property
    def key_shape(self) -> tuple[int, ...]:
        """The shape that each key must have."""
        return Axes(self.rule.axes).theirs_shape(self.part_shape)

    @property
    def is_rename(self) -> bool:
        """Whether our leaf is what its only key holds, as it stands."""
        return isinstance(self.rule.theirs, str) and not self.rule.axes and not self.rule.offset

    def to_ours(self, *parts: Any) -> Any:
        """Our leaf from the arrays of all keys."""
        ours = [self.part_to_ours(part) for part in parts]
        return ours[0] if isinstance(self.rule.theirs, str) else np.stack(ours)

    def parts(self, leaf: Any) -> tuple[Any, ...]:
        """The parts of our leaf that the keys hold, one each; of a numpy array they are views."""
        return (leaf,) if isinstance(self.rule.theirs, str) else tuple(leaf)

    def part_to_ours(self, array: Any) -> Any:
        """Our part from the array of one key."""
        part = Axes(self.rule.axes).to_ours(array, self.part_shape)
        return part - self.rule.offset if self.rule.offset else part

    def part_to_theirs(self, part: Any) -> Any:
        """The array of one key from our part."""
        array = Axes(self.rule.axes).to_theirs(part)
        return array + self.rule.offset if self.rule.offset else array


def leaf_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Path and shape of every array of a model or of its `eqx.filter_eval_shape`."""
    return {path: leaf.shape for path, leaf in leaves(model)}


def leaves(model: Any) -> list[tuple[str, Any]]:
    """Path and value of every leaf, in tree order: `layers.0.attention.output.weight`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), value) for path, value in flat]


def fill(skeleton: Any, values: Mapping[str, Any]) -> Any:
    """The skeleton with every leaf replaced by the value at its path."""
    structure = jax.tree.structure(skeleton)
    return jax.tree.unflatten(structure, [values[path] for path, _ in leaves(skeleton)])


def plan(
    ours: Mapping[str, tuple[int, ...]],
    rules: Iterable[Rule],
    theirs: Mapping[str, tuple[int, ...]] | None = None,
    ignore: Iterable[Ignore] = (),
) -> list[Assignment]:
    """What goes where, in the order of our leaves.

    **Arguments:** `ours`: shape of every leaf, from `leaf_shapes`. `theirs`: shape of every named
    array found, or None when there is nothing to compare with yet, as before saving.

    **Raises:** `CheckpointError` with all differences at once.
    """
    rules = tuple(rules)
    patterns = [_pattern(rule.ours) for rule in rules]
    problems: list[str] = []
    assignments: list[Assignment] = []
    for path, shape in ours.items():
        matches = [
            (rule, match)
            for rule, pattern in zip(rules, patterns, strict=True)
            if (match := pattern.fullmatch(path))
        ]
        if len(matches) != 1:
            problems.append(f"{path}: {len(matches)} rules name this weight, there should be one")
            continue
        rule, match = matches[0]
        names = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
        keys = tuple(name.format(**match.groupdict()) for name in names)
        assignments.append(Assignment(path, keys, rule, shape))

    uses = Counter(key for assignment in assignments for key in assignment.keys)
    problems += [f"{key}: named by {count} weights" for key, count in uses.items() if count > 1]
    if theirs is not None:
        problems += _differences(assignments, theirs, ignore)
    if problems:
        raise CheckpointError(
            f"The weights do not fit the model, {len(problems)} difference(s):\n  "
            + "\n  ".join(problems)
        )
    return assignments


def _differences(
    assignments: list[Assignment],
    theirs: Mapping[str, tuple[int, ...]],
    ignore: Iterable[Ignore],
) -> list[str]:
    expected = {key: assignment for assignment in assignments for key in assignment.keys}
    ignored = [_pattern(name.theirs) for name in ignore]
    missing = [f"{key}: missing" for key in expected if key not in theirs]
    extra = [
        f"{key}: not a part of this model"
        for key in theirs
        if key not in expected and not any(pattern.fullmatch(key) for pattern in ignored)
    ]
    misshaped = [
        f"{key}: expected shape {list(assignment.key_shape)}, got {list(theirs[key])}"
        for key, assignment in expected.items()
        if key in theirs and tuple(theirs[key]) != assignment.key_shape
    ]
    return missing + extra + misshaped


def _pattern(template: str) -> re.Pattern[str]:
    """`layers.{i}.x` as an anchored regular expression with a named group for each number."""
    words = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(
            f"(?P<{word}>[0-9]+)" if index % 2 else re.escape(word).replace(r"\*", ".*")
            for index, word in enumerate(words)
        )
    )
