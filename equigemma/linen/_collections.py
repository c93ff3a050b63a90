"""Filters of variable collections, as Linen's `mutable`."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Denying(Protocol):
    """Everything except what `deny` selects. Any object with such a field will do."""

    @property
    def deny(self) -> Any: ...


Filter = bool | str | Collection[str] | Denying
"""All or none, one collection by name, several, or all except some."""


@dataclass(frozen=True)
class DenyList:
    """All collections except those that `deny` selects."""

    deny: Filter


def selects(chosen: Filter, collection: str) -> bool:
    """Whether `chosen` contains the collection called `collection`.

    **Raises:** `TypeError` for anything that is not a filter.
    """
    match chosen:
        case bool():
            return chosen
        case str():
            return collection == chosen
        case Collection():
            return collection in chosen
        case Denying():
            return not selects(chosen.deny, collection)
    raise TypeError(
        "`mutable` must be a bool, the name of a collection, several names, or an object with a "
        f"field `deny`; got {type(chosen).__name__}."
    )
