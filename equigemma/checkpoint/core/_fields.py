"""The keys of a JSON object or of other metadata, read so that none goes unnoticed."""

from collections.abc import Mapping
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError


class Fields:
    """The keys of an object, and which of them have not been read yet."""

    def __init__(
        self, data: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, name: str = ""
    ):
        self._rest = dict(data)
        self._defaults = defaults or {}
        self._name = name

    def __contains__(self, key: str) -> bool:
        return key in self._rest

    def number(self, key: str, default: Any = None) -> float:
        value = self.take(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or value != value:
            raise CheckpointError(f"its {self._name}{key} must be a number, got {short(value)}.")
        # Beyond this whole numbers and floats part; no option comes near it.
        if abs(value) >= 2**53:
            raise CheckpointError(f"its {self._name}{key} must be below 2**53, got {short(value)}.")
        return value

    def number_or_none(self, key: str) -> float | None:
        return None if self._is_none(key) else float(self.number(key))

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.number(key, default)
        if value != int(value) or value < least:
            raise CheckpointError(
                f"its {self._name}{key} must be a whole number from {least} up, got {value!r}."
            )
        return int(value)

    def size_or_none(self, key: str) -> int | None:
        return None if self._is_none(key) else self.size(key)

    def table(self, key: str) -> dict[str, Any]:
        """The object of a key; none, or null, is an empty one."""
        value = self.take(key, {})
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise CheckpointError(f"its {self._name}{key} must be an object, got {short(value)}.")
        return value

    def take(self, key: str, default: Any = None) -> Any:
        return self._rest.pop(key, self._defaults.get(key) if default is None else default)

    def _is_none(self, key: str) -> bool:
        """Whether there is no number; then the key is taken."""
        is_none = self._rest.get(key, self._defaults.get(key)) is None
        if is_none:
            self._rest.pop(key, None)
        return is_none

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuses any value that is there but those."""
        value = self._rest.pop(key, allowed[0])
        # 0 is False and 1 is True in Python, not in JSON.
        if not any(value == only and type(value) in _alike(only) for only in allowed):
            raise CheckpointError(
                f"its {self._name}{key} is {short(value)}; only "
                f"{' and '.join(map(repr, allowed))} {'is' if len(allowed) == 1 else 'are'} "
                "supported here."
            )

    def refuse_rest(self, without_effect: frozenset[str] = frozenset()) -> None:
        unknown = sorted(set(self._rest) - without_effect)
        if unknown:
            raise CheckpointError(
                "it has options that are not supported: "
                + ", ".join(f"{self._name}{key}" for key in unknown)
                + "."
            )


def short(value: Any) -> str:
    """How a value looks, unless a message would drown in it."""
    match value:
        case dict():
            return "an object"
        case list() if len(value) < 10 and all(isinstance(each, int | float) for each in value):
            return f"[{', '.join(map(short, value))}]"
        case list():
            return "a list"
        case int() if abs(value) >= 2**53:
            return "a huge number"
        case _:
            text = repr(value)
            return text if len(text) < 100 else f"{text[:97]}..."


def _alike(value: Any) -> tuple[type, ...]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (int, float) if is_number else (type(value),)
