"""JSON records of a file: one in each line, an array of them, or one after the other."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple


class Record(NamedTuple):
    """A value and where it stands; instead of a value, what keeps it from being one."""

    line: int
    value: Any = None
    error: str | None = None


def records(text: str) -> Iterator[Record]:
    """The values in a text, as they come. Bad lines do not end them; a bad array does."""
    reader = _Reader(text)
    if reader.skips("["):
        return _array(reader)
    return _values(reader) if reader.next_has_several_lines() else _lines(text)


def parse(line: int, text: str) -> Record:
    """The value that is a whole line."""
    try:
        return Record(line, json.loads(text))
    except (ValueError, RecursionError) as error:
        return Record(line, error=_reason(error))


def is_records(text: str, keys: set[str]) -> bool:
    """Whether a text, of whatever name, begins with a record that has one of the keys."""
    if not text.lstrip(_SPACE).startswith(("{", "[")):
        return False
    first = next(records(text), Record(1))
    return isinstance(first.value, dict) and not keys.isdisjoint(first.value)


_DECODER = json.JSONDecoder()
_SPACE = " \t\n\r"


class _Reader:
    """A place in a text, and the line that it is in."""

    def __init__(self, text: str):
        self.text, self.at, self.line = text, 0, 1
        self._to(0)

    def skips(self, character: str) -> bool:
        """Whether that is what comes next; if so it is passed, with the white space after it."""
        if found := self.text.startswith(character, self.at):
            self._to(self.at + 1)
        return found

    @property
    def is_done(self) -> bool:
        return self.at == len(self.text)

    def next_has_several_lines(self) -> bool:
        """Whether a value comes next that does not end in this line."""
        try:
            _, end = _DECODER.raw_decode(self.text, self.at)
        except (ValueError, RecursionError):
            return False
        return "\n" in self.text[self.at : end]

    def value(self) -> Record:
        """The value that comes next, which is passed, or what is wrong with it."""
        line = self.line
        try:
            value, end = _DECODER.raw_decode(self.text, self.at)
        except (ValueError, RecursionError) as error:
            return Record(getattr(error, "lineno", line), error=_reason(error))
        self._to(end)
        return Record(line, value)

    def wrong(self, reason: str) -> Record:
        return Record(self.line, error=f"not JSON: {reason}.")

    def _to(self, at: int) -> None:
        while at < len(self.text) and self.text[at] in _SPACE:
            at += 1
        self.line += self.text.count("\n", self.at, at)
        self.at = at


def _lines(text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield parse(number, line)


def _values(reader: _Reader) -> Iterator[Record]:
    while not reader.is_done:
        record = reader.value()
        yield record
        if record.error is not None:
            return


def _array(reader: _Reader) -> Iterator[Record]:
    if reader.skips("]"):
        return
    while True:
        record = reader.value()
        yield record
        if record.error is not None:
            return
        if reader.skips("]"):
            break
        if not reader.skips(","):
            reason = "the array does not end" if reader.is_done else "a comma is missing"
            yield reader.wrong(reason)
            return
    if not reader.is_done:
        yield reader.wrong("there is something after the array")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}."
    if isinstance(error, RecursionError):
        return "not JSON that can be read: it is nested too deep."
    return f"not JSON that can be read: {error}."
