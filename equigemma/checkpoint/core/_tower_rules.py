"""The leaves of a vision tower and its projection, for formats that store them as PyTorch does.

What they are called there is up to each format.

**Source:** transformers `models/siglip/modeling_siglip.py`, `models/gemma3/modeling_gemma3.py`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from equigemma.checkpoint.core._keymap import Rule


class TowerNames(NamedTuple):
    """Names of the parts; of most, `.weight` and `.bias` are the arrays."""

    patches: str
    positions: str
    attention_norm: str
    query: str
    key: str
    value: str
    output: str
    ffw_norm: str
    up: str
    down: str
    final_norm: str
    norm: str
    projection: str
    """Of the array itself."""


def tower_rules(names: TowerNames, *, offset: float = 0.0) -> Iterator[Rule]:
    """Names for the leaves under `vision`. `offset`: of the scale before the projection."""

    def affine(ours: str, theirs: str, axes: str, bias: str = "") -> Iterator[Rule]:
        yield Rule(f"vision.tower.{ours}.linear.weight", f"{theirs}.weight", axes=axes)
        yield Rule(f"vision.tower.{ours}.bias", f"{theirs}.bias", axes=bias)

    def norm(ours: str, theirs: str) -> Iterator[Rule]:
        yield Rule(f"vision.tower.{ours}.scale", f"{theirs}.weight")
        yield Rule(f"vision.tower.{ours}.bias", f"{theirs}.bias")

    yield from affine("patches", names.patches, "T C Y Z -> Y Z C T")
    # Ours has an axis of size 1 before: a name alone in its tuple is stacked with nothing.
    yield Rule("vision.tower.positions", (f"{names.positions}.weight",))
    layer = "layers.{i}."
    yield from norm(f"{layer}attention_norm", names.attention_norm)
    yield from norm(f"{layer}ffw_norm", names.ffw_norm)
    for part in ("query", "key", "value"):
        theirs = names._asdict()[part]
        yield from affine(f"{layer}attention.{part}", theirs, "(N H) T -> T N H", "(N H) -> N H")
    yield from affine(f"{layer}attention.output", names.output, "T (N H) -> N H T")
    yield from affine(f"{layer}up", names.up, "F T -> T F")
    yield from affine(f"{layer}down", names.down, "T F -> F T")
    yield from norm("final_norm", names.final_norm)
    yield Rule("vision.norm.scale", f"{names.norm}.weight", offset=offset)
    yield Rule("vision.projection.weight", names.projection)
