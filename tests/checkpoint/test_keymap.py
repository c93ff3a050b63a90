"""The engine of two-way rules: names are anchored, every weight is set once, every key is used."""

import numpy as np
import pytest

from equigemma.checkpoint import CheckpointError
from equigemma.checkpoint.core._axes import Axes
from equigemma.checkpoint.core._keymap import Ignore, Rule, plan


OURS = {"a.0.w": (3, 5), "a.1.w": (3, 5), "b.w": (2, 7, 3)}
RULES = (
    Rule("a.{i}.w", "x.{i}", axes="(N H) -> N H"),
    Rule("b.w", ("left", "right"), axes="K D -> D K", offset=1.0),
)
THEIRS = {"x.0": (15,), "x.1": (15,), "left": (3, 7), "right": (3, 7)}


def test_a_plan_names_every_weight_and_every_key():
    assigned = plan(OURS, RULES, THEIRS)
    assert [(entry.path, entry.keys) for entry in assigned] == [
        ("a.0.w", ("x.0",)),
        ("a.1.w", ("x.1",)),
        ("b.w", ("left", "right")),
    ]


def test_reshapes_undo_themselves():
    rng = np.random.default_rng(0)
    for entry in plan(OURS, RULES, THEIRS):
        ours = rng.normal(size=entry.shape)
        for part in entry.parts(ours):
            theirs = entry.part_to_theirs(part)
            assert theirs.shape == entry.key_shape
            # 1 is added and taken off in float64.
            np.testing.assert_allclose(entry.part_to_ours(theirs), part, rtol=0, atol=1e-15)
    array = np.arange(30).reshape(6, 5)
    split = Axes("(N H) D -> N D H").to_ours(array, (2, 5, 3))
    np.testing.assert_array_equal(split[1], array[3:].T)
    np.testing.assert_array_equal(Axes("(N H) D -> N D H").to_theirs(split), array)


@pytest.mark.parametrize("name", ["xa.0.w", "a.0.wx", "a.0xw", "a..w", "a.x.w", "a.0.w\n"])
def test_names_are_anchored_at_both_ends(name):
    with pytest.raises(CheckpointError, match="0 rules name this weight, there should be one"):
        plan({name: (3, 5)}, RULES)


@pytest.mark.parametrize("key", ["x.00", "zx.0", "x.0z", "x0", "rest", "a.rest.b"])
def test_other_keys_are_refused_unless_there_is_a_reason(key):
    theirs = THEIRS | {key: (1,)}
    with pytest.raises(CheckpointError, match=f"{key}: not a part of this model"):
        plan(OURS, RULES, theirs, [Ignore("rest.*", "another part")])
    assert plan(OURS, RULES, theirs, [Ignore(key, "not needed")]) == plan(OURS, RULES)


def test_a_weight_or_a_key_named_twice():
    with pytest.raises(CheckpointError, match="b.w: 2 rules name this weight"):
        plan(OURS, (*RULES, Rule("b.w", "other")))
    with pytest.raises(CheckpointError, match="x.0: named by 2 weights"):
        plan({"a.0.w": (3, 5), "c.w": (15,)}, (*RULES, Rule("c.w", "x.0")))


def test_all_differences_come_at_once():
    theirs = {"x.0": (15,), "left": (7, 3), "right": (3, 7), "more": (1,)}
    with pytest.raises(CheckpointError) as caught:
        plan(OURS, RULES, theirs)
    assert str(caught.value).splitlines() == [
        "The weights do not fit the model, 3 difference(s):",
        "  x.1: missing",
        "  more: not a part of this model",
        "  left: expected shape [3, 7], got [7, 3]",
    ]
