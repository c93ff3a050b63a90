"""Strings that know where each of their characters comes from, through the operations on strings.

A chat template puts what is said between special tokens and gives back one string. Which characters
of it are the template's own, and which ones somebody has said, is what these strings carry along.

The rule is that nothing is the template's own unless it is known to be: an operation that is not
restated here gives an ordinary string, of which nothing is known.
"""

from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex


OWN, SAID, UNKNOWN = "o", "s", "?"
"""The template's own, of the conversation, and what an operation has made of either."""


class Text(str):
    """A string with the origin of each character: `OWN`, `SAID` or `UNKNOWN`."""

    __slots__ = ("_origin",)
    # The underscore keeps it out of the reach of a template.
    _origin: str

    def __new__(cls, text: str = "", origin: str | None = None) -> "Text":
        """**Arguments:** `origin`: one letter for each character, or one for all of them."""
        self = super().__new__(cls, text)
        letters = UNKNOWN if origin is None else origin
        self._origin = letters if len(letters) == len(text) else letters * len(text)
        return self

    def __str__(self) -> "Text":
        return self

    def __add__(self, other: Any) -> "Text":
        if not isinstance(other, str):
            return NotImplemented
        return Text(str.__add__(self, other), self._origin + origin(other))

    def __radd__(self, other: Any) -> "Text":
        if not isinstance(other, str):
            return NotImplemented
        return Text(str.__add__(other, self), origin(other) + self._origin)

    def __mul__(self, count: SupportsIndex) -> "Text":
        return Text(str.__mul__(self, count), self._origin * count.__index__())

    def __rmul__(self, count: SupportsIndex) -> "Text":
        return self * count

    def __getitem__(self, index: SupportsIndex | slice) -> "Text":
        return Text(str.__getitem__(self, index), self._origin[index])

    def __iter__(self) -> Iterator["Text"]:
        return map(Text, str.__iter__(self), self._origin)

    def lower(self) -> str:
        return self._mapped(str.lower(self))

    def upper(self) -> str:
        return self._mapped(str.upper(self))

    def title(self) -> str:
        return self._mapped(str.title(self))

    def capitalize(self) -> str:
        return self._mapped(str.capitalize(self))

    def lstrip(self, chars: str | None = None) -> "Text":
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> "Text":
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None) -> "Text":
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> "Text":
        return self[len(prefix) :] if str.startswith(self, prefix) else self

    def removesuffix(self, suffix: str) -> "Text":
        return self[: len(self) - len(suffix)] if suffix and str.endswith(self, suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(self._pieces(str.split(self, sep, maxsplit), sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(self._pieces(str.rsplit(self, sep, maxsplit), sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return list(self._pieces(str.splitlines(self, keepends), None))

    def partition(self, sep: str) -> tuple["Text", "Text", "Text"]:
        return tuple(self._pieces(str.partition(self, sep), ""))  # pyright: ignore[reportReturnType]

    def rpartition(self, sep: str) -> tuple["Text", "Text", "Text"]:
        return tuple(self._pieces(str.rpartition(self, sep), ""))  # pyright: ignore[reportReturnType]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        if not old:
            # Between all characters: nobody does that, and it would be a rule of its own.
            return str.replace(self, old, new, count)
        return Text(new, origin(new)).join(self.split(old, count))

    def join(self, items: Iterable[str]) -> "Text":
        parts = list(items)
        return Text(str.join(self, parts), self._origin.join(map(origin, parts)))

    def _mapped(self, text: str) -> str:
        """Character by character, unless one became several."""
        return Text(text, self._origin) if len(text) == len(self) else text

    def _pieces(self, pieces: Iterable[str], sep: str | None) -> Iterator["Text"]:
        """Parts of this string in their order, with `sep` between them; None: with white space.

        A part that follows white space does not begin with any, and a line has no end of a line
        in it: so the first place where it is found is its own.
        """
        at = 0
        for piece in pieces:
            at = str.find(self, piece, at) if sep is None else at
            yield self[at : at + len(piece)]
            at += len(piece) + len(sep or "")


def origin(text: str) -> str:
    """The origin of each character; of an ordinary string nothing is known."""
    return text._origin if isinstance(text, Text) else UNKNOWN * len(text)


def said(value: Any) -> Any:
    """What JSON has, with every text in it marked as that of the conversation, names included."""
    match value:
        case str():
            return Text(value, SAID)
        case dict():
            return {said(key): said(item) for key, item in value.items()}
        case list():
            return [said(item) for item in value]
    return value
