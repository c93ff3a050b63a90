"""One module of DeepMind's model, and where its values come from in ours."""

from dataclasses import dataclass
from typing import Any

from equigemma.linen._values import Value, result


@dataclass(frozen=True)
class Place:
    """A module of theirs at `scope` with one `method`, and the call of ours that gives its value.

    `source` is the path of our module and `source_method` its method; `inner` is the path of a
    module within, whose last call `value` needs too.
    """

    source: str
    scope: str
    value: Value = result
    name: str = ""
    """Of the module; that of its scope unless given."""
    method: str = "__call__"
    source_method: str = "__call__"
    inner: str | None = None

    def __post_init__(self):
        if not self.name:
            object.__setattr__(self, "name", self.scope.rpartition("/")[2])


def module_at(model: Any, path: str) -> Any:
    """The module at `path`; None where this model has none."""
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name, None)
    return model
