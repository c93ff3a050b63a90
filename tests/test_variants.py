"""Every variant's config, parameter tree and parameter count against DeepMind's, by shapes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import pytest
import upstream

from equigemma import variants
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.checkpoint.gemma._config_fields import config_from_upstream
from equigemma.checkpoint.gemma._params import to_params
from equigemma.config import ModelConfig


@cache
def trees() -> dict[str, Any]:
    """DeepMind's models: config, number of parameters, and shapes by path."""
    return json.loads((upstream.GOLDEN / "upstream_trees.json").read_text())


def layers(ranges: str) -> Iterator[int]:
    """`"0-4,6"` is 0, 1, 2, 3, 4, 6."""
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def shapes_of(params: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape: `{i}` in a path stands for the layers that have the shape."""
    shapes = {}
    for path, stored in params.items():
        for shape, ranges in ({stored: "0"} if isinstance(stored, str) else stored).items():
            for index in layers(ranges):
                shapes[path.format(i=index)] = tuple(map(int, shape.split("x")))
    return shapes


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, node in tree.items():
        if isinstance(node, dict):
            shapes |= flat(node, f"{prefix}{name}/")
        else:
            shapes[prefix + name] = node.shape
    return shapes


def ours(name: str) -> ModelConfig:
    """`Gemma3_4B` is `gemma3-4b` without its vision tower, `Gemma3_4B_mm` with it."""
    config = variants.get(name.removesuffix("_mm").lower().replace("_", "-"))
    return config if name.endswith("_mm") else config.text_only()


KNOWN = list(trees())


def test_all_of_gemma_2_and_3_are_compared():
    assert len([name for name in KNOWN if name.startswith(("Gemma2_", "Gemma3_"))]) == 3 + 5 + 3


@pytest.mark.parametrize("name", KNOWN)
def test_config(name):
    # The golden files show that the conversion of their configs gives their numbers.
    text_only = not name.endswith("_mm")
    assert ours(name) == config_from_upstream(trees()[name]["config"], text_only=text_only)


@pytest.mark.parametrize("name", KNOWN)
def test_parameters(name):
    model = skeleton(ours(name))
    assert flat(to_params(model)) == shapes_of(trees()[name]["params"])
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == trees()[name]["num_params"]


def test_gemma_1():
    # Published sizes: 2,506,172,416 and 8,537,680,896 (arXiv:2403.08295, embedding included once).
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(skeleton(variants.get(name))))
        for name in ("gemma1-2b", "gemma1-7b")
    }
    assert counts == {"gemma1-2b": 2_506_172_416, "gemma1-7b": 8_537_680_896}


def test_names():
    names = variants.names()
    assert names[:5] == ("gemma1-2b", "gemma1-7b", "gemma2-2b", "gemma2-9b", "gemma2-27b")
    assert len(set(names)) == len(names)
    assert variants.get("Gemma3-270M") is variants.get("gemma3-270m")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("gemma3-270", "gemma3-270m"), ("gemma-2-9b", "gemma2-9b"), ("gemma1-7", "gemma1-7b")],
)
def test_an_unknown_name_is_answered_by_the_nearest(wrong, nearest):
    with pytest.raises(ValueError) as error:
        variants.get(wrong)
    assert f"no model called {wrong!r}; did you mean {nearest!r}?" in str(error.value)
    assert "gemma3-27b" in str(error.value)


@pytest.mark.parametrize("name", variants.names())
def test_a_config_is_a_value(name):
    config = variants.get(name)
    assert isinstance(config, ModelConfig)
    assert hash(config) == hash(replace(config))
    assert config == replace(config) != replace(config, width=config.width + 2)
    assert repr(config).count("\n") == 0 and f"<{len(config.layers)} layers>" in repr(config)
