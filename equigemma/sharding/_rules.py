"""Rules: from letters of the axis legend to axes of a device mesh."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from jax.sharding import AbstractMesh, Mesh

from equigemma._arguments import described


LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVXYZ")
"""The axis legend."""


@dataclass(frozen=True)
class Rules:
    """Mesh axes by letter of the axis legend; an axis without a rule is not split.

    Of the batch, `"B"`, it is the first axis. A mesh axis splits an array once: the first axis of
    the array that has it in its rule.
    """

    axes: Mapping[str, str | tuple[str, ...]]
    """`{"N": "tensor", "D": "fsdp", "B": ("data", "fsdp")}`."""
    may_replicate: str = field(default="", kw_only=True)
    """Letters of axes that are replicated where the mesh does not divide their size, rather than
    refused. Few key/value heads, `"K"`, are the usual case."""

    def __post_init__(self):
        if not isinstance(self.axes, Mapping):
            raise TypeError(
                f"Rules are a mapping from letters to mesh axes, such as {{'N': 'tensor'}}; got "
                f"{described(self.axes)}."
            )
        for letter in (*self.axes, *self.may_replicate):
            if letter not in LETTERS:
                raise ValueError(
                    f"Rules are for the letters of the axis legend, such as 'N', query heads, or "
                    f"'D', the width of the model; got {letter!r}."
                )
        named = {letter: _names(letter, axes) for letter, axes in self.axes.items()}
        object.__setattr__(self, "axes", MappingProxyType(named))

    def __hash__(self) -> int:
        return hash((tuple(self.axes.items()), self.may_replicate))

    def mesh_axes(self, letters: str) -> tuple[str, ...]:
        """The mesh axes that an array axis is split over; several letters are merged axes."""
        found = (name for letter in letters for name in self.axes.get(letter, ()))
        return tuple(dict.fromkeys(found))


def _names(letter: str, axes: object) -> tuple[str, ...]:
    names = (axes,) if isinstance(axes, str) else axes
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"The rule of {letter!r} must be the name of a mesh axis, or a tuple of names; got "
            f"{described(axes)}."
        )
    return names


# The batch goes along with what gathers the weights for it: that is what FSDP is.
_SPLIT_OVER = {"data": "B", "fsdp": "BDTP", "tensor": "NKFV", "expert": "E"}


def _table(*mesh_axes: str) -> Rules:
    axes: dict[str, tuple[str, ...]] = {}
    for name in mesh_axes:
        for letter in _SPLIT_OVER[name]:
            axes[letter] = (*axes.get(letter, ()), name)
    return Rules(axes, may_replicate="K")


PRESETS: Mapping[str, Rules] = MappingProxyType(
    {
        "data": _table("data"),
        "fsdp": _table("fsdp"),
        "tensor": _table("tensor"),
        "fsdp_tensor": _table("fsdp", "tensor"),
        "expert": _table("expert"),
    }
)
"""Rules by name, for meshes with axes of these names. Key/value heads may be replicated."""


def rules_for(mesh: Mesh | AbstractMesh) -> Rules:
    """The usual rules for a mesh with some of the axes `data`, `fsdp`, `tensor` and `expert`.

    Batches are split over `data` and `fsdp`; the widths of model, encoders and per-layer inputs
    over `fsdp`; heads, hidden sizes and the vocabulary over `tensor`; experts over `expert`.

    **Arguments:** `mesh`: of devices, or an `AbstractMesh` of names and sizes.

    **Returns:** the rules, as `specs` takes them.

    **Raises:** `ValueError` for an axis with another name.
    """
    if unknown := [name for name in mesh.axis_names if name not in _SPLIT_OVER]:
        raise ValueError(
            f"There are rules for mesh axes named {', '.join(_SPLIT_OVER)}; this mesh has one "
            f"named {unknown[0]!r}. Give rules=, from letters to mesh axes."
        )
    return _table(*(name for name in _SPLIT_OVER if name in mesh.axis_names))


def as_rules(rules: Rules | Mapping | str | None, mesh: Mesh | AbstractMesh) -> Rules:
    """Rules of any form, checked against the axes of a mesh.

    **Raises:** `TypeError` for what are no rules or is no mesh; `ValueError` for a preset that does
    not exist, or a mesh axis that the mesh does not have.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"`mesh` must be a mesh of devices, as jax.make_mesh gives it; got {described(mesh)}."
        )
    if rules is None:
        return rules_for(mesh)
    if isinstance(rules, str):
        if rules not in PRESETS:
            raise ValueError(f"`rules` must be one of {', '.join(PRESETS)}; got {rules!r}.")
        rules = PRESETS[rules]
    rules = rules if isinstance(rules, Rules) else Rules(rules)
    for letter, names in rules.axes.items():
        if unknown := [name for name in names if name not in mesh.axis_names]:
            raise ValueError(
                f"The rule of {letter!r} names the mesh axis {unknown[0]!r}, and the mesh has "
                f"{', '.join(map(repr, mesh.axis_names))}."
            )
    return rules
