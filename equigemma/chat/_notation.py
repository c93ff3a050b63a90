"""The notation in which Gemma 4 writes tools, calls and results: JSON without quoted keys.

Strings stand between two special tokens `<|"|>`, so that nothing within them needs an escape.

**Source:** Google's "Gemma 4 Prompt Formatting" and "Function calling with Gemma 4"; the package
`dialog` 1.1, with which DeepMind's gemma writes conversations.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from equigemma.chat._markup import Part, Special
from equigemma.chat._messages import ToolCall


QUOTE = Special('<|"|>')


def write(value: Any) -> Iterator[Part]:
    """A value that JSON has.

    **Raises:** `ValueError` for anything else.
    """
    match value:
        case str():
            yield from (QUOTE, value, QUOTE)
        case bool():
            yield "true" if value else "false"
        case None:
            yield "null"
        case int():
            yield str(value)
        case float() if math.isfinite(value):
            # A whole number has no point, whatever its type.
            yield str(int(value)) if value.is_integer() else str(value)
        case Mapping():
            yield "{"
            for index, (key, item) in enumerate(value.items()):
                yield f"{',' if index else ''}{key}:"
                yield from write(item)
            yield "}"
        case Sequence():
            yield "["
            for index, item in enumerate(value):
                yield "," if index else ""
                yield from write(item)
            yield "]"
        case _:
            raise ValueError(
                f"Tools take and give values that JSON has, got a {type(value).__name__}."
            )


def declaration(tool: Mapping[str, Any]) -> Iterator[Part]:
    """A tool, described as OpenAI's interface does it, in the order that the model was taught.

    **Raises:** `ValueError` if it is no such description.
    """
    match tool:
        case {"function": {"name": str(name), **rest}}:
            yield f"declaration:{name}"
            yield from write(_schema(rest))
        case _:
            raise ValueError(
                'A tool is {"type": "function", "function": {"name": ..., "description": ..., '
                f'"parameters": ...}}}}, got {tool}.'
            )


def _schema(value: Any) -> Any:
    """Keys in alphabetical order, names of types in capitals."""
    match value:
        case Mapping():
            return {key: _field(key, value[key]) for key in sorted(value)}
        case list() | tuple():
            return [_schema(item) for item in value]
    return value


def _field(key: str, value: Any) -> Any:
    match key, value:
        case "type", str():
            return value.upper()
        case "type", list():
            return [kind.upper() for kind in value]
    return _schema(value)


def read_call(pieces: Sequence[str | None]) -> ToolCall | None:
    """The call that a model wrote, as texts with None for each quote; None: it is not a call."""
    words = _Words(pieces)
    try:
        words.expect("call")
        words.expect(":")
        name = words.take()
        arguments = words.value()
    except (IndexError, ValueError, RecursionError):
        return None
    return ToolCall(name, arguments) if isinstance(arguments, dict) and words.ended else None


class _Quoted(str):
    """A text that stood between quotes."""


class _Words:
    """Signs, bare words and quoted strings, read from left to right."""

    def __init__(self, pieces: Sequence[str | None]):
        self._words: list[str] = []
        self._at = 0
        text, quoted = "", False
        for piece in (*pieces, None):
            if piece is not None:
                text += piece
                continue
            bare = filter(None, map(str.strip, re.split(r"([{}\[\],:])", text)))
            self._words += [_Quoted(text)] if quoted else bare
            text, quoted = "", not quoted

    @property
    def ended(self) -> bool:
        return self._at == len(self._words)

    def take(self) -> str:
        self._at += 1
        return self._words[self._at - 1]

    def expect(self, sign: str) -> None:
        if (word := self.take()) != sign or isinstance(word, _Quoted):
            raise ValueError(f"expected {sign}, got {word}")

    def skip(self, sign: str) -> bool:
        """Whether `sign` comes next; if so, it is taken."""
        word = self._words[self._at]
        found = word == sign and not isinstance(word, _Quoted)
        self._at += found
        return found

    def value(self) -> Any:
        if self.skip("{"):
            return dict(self._items("}", self._entry))
        if self.skip("["):
            return list(self._items("]", self.value))
        word = self.take()
        # Without quotes there are numbers, true, false and null, all of them as JSON has them.
        return str(word) if isinstance(word, _Quoted) else json.loads(word)

    def _items(self, end: str, item: Callable[[], Any]) -> Iterator[Any]:
        if self.skip(end):
            return
        yield item()
        while not self.skip(end):
            self.expect(",")
            yield item()

    def _entry(self) -> tuple[str, Any]:
        key = str(self.take())
        self.expect(":")
        return key, self.value()
