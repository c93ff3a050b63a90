"""Regular expressions of untrusted files, matched in linear time.

Python's own matcher tries one way after another, and a pattern can be made for which there are more
ways than anyone can wait for. Here all ways are followed at once, so that a name of n characters
takes at most n times as many steps as the pattern has parts. What a match is agrees with `re`; what
this has no words for, such as references back, is refused.

**Source:** Thompson 1968, "Regular expression search algorithm".
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple


_MOST_STATES = 10_000
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": lambda c: bool(re.match(r"\d", c)),
    "w": lambda c: bool(re.match(r"\w", c)),
    "s": lambda c: bool(re.match(r"\s", c)),
}
_COUNTS = re.compile(r"\{(?!,?\})(\d*)(?:(,)(\d*))?\}")
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}

Test = Callable[[str], bool]
"""Whether one character is meant."""
Place = Callable[[str, int], bool]
"""Whether a place between two characters of a text is meant."""


class _State(NamedTuple):
    """One of: a character and the state after it; a place and the state after it; a choice."""

    test: Test | None
    place: Place | None
    after: list[int]


class PatternError(ValueError):
    """A pattern that is none, or that is not supported here."""


def matches(pattern: str, text: str) -> bool:
    """Whether `re.match(pattern, text)` finds anything."""
    return _run(pattern, text, whole=False)


def matches_whole(pattern: str, text: str) -> bool:
    """Whether `re.fullmatch(pattern, text)` finds anything."""
    return _run(pattern, text, whole=True)


def _run(pattern: str, text: str, *, whole: bool) -> bool:
    states, start, end = _compiled(pattern)
    current = _closure(states, [start], text, 0)
    for at, character in enumerate(text):
        if end in current and not whole:
            return True
        after = [
            following
            for index in current
            if (state := states[index]).test is not None and state.test(character)
            for following in state.after
        ]
        current = _closure(states, after, text, at + 1)
    return end in current


def _closure(states: list[_State], begin: Iterable[int], text: str, at: int) -> set[int]:
    """The states that are reached without a character."""
    found: set[int] = set()
    waiting = list(begin)
    while waiting:
        index = waiting.pop()
        if index in found:
            continue
        found.add(index)
        state = states[index]
        if state.test is None and (state.place is None or state.place(text, at)):
            waiting += state.after
    return found


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> tuple[list[_State], int, int]:
    parser = _Parser(pattern)
    start, ends = parser.choice()
    if parser.at != len(pattern):
        raise PatternError(f"{pattern!r:.80} has a ) that closes nothing")
    end = parser.state()
    parser.join(ends, end)
    return parser.states, start, end


class _Parser:
    """Reads a pattern and makes its states; a piece is its first state and those to go on from."""

    def __init__(self, pattern: str):
        self.pattern, self.at, self.states, self.depth = pattern, 0, [], 0

    def state(self, test: Test | None = None, place: Place | None = None) -> int:
        if len(self.states) >= _MOST_STATES:
            raise PatternError(f"{self.pattern!r:.80} repeats too much")
        self.states.append(_State(test, place, []))
        return len(self.states) - 1

    def join(self, ends: list[int], to: int) -> None:
        for end in ends:
            self.states[end].after.append(to)

    def next(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self, text: str) -> bool:
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def choice(self) -> tuple[int, list[int]]:
        start, ends = self.state(), []
        while True:
            first, last = self.sequence()
            self.join([start], first)
            ends += last
            if not self.take("|"):
                return start, ends

    def sequence(self) -> tuple[int, list[int]]:
        start = self.state()
        ends = [start]
        while self.next() and self.next() not in "|)":
            begin = self.at
            first, last = self.atom()
            first, last = self.repeated(begin, first, last)
            self.join(ends, first)
            ends = last
        return start, ends

    def repeated(self, begin: int, first: int, last: list[int]) -> tuple[int, list[int]]:
        """What follows an atom that begins at `begin` in the pattern."""
        if (counts := _COUNTS.match(self.pattern, self.at)) is not None:
            self.at = counts.end()
            least = int(counts[1] or 0)
            most = (int(counts[3]) if counts[3] else None) if counts[2] else least
        elif self.next() and self.next() in "*+?":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self.next()]
            self.at += 1
        else:
            return first, last
        self.take("?")  # the shortest first: which is found first makes no difference here
        if self.next() and self.next() in "*+?":
            raise PatternError(f"{self.pattern!r:.80} repeats what is repeated")
        end = self.at
        if most is not None and (most < least or most > _MOST_STATES) or least > _MOST_STATES:
            raise PatternError(f"{self.pattern!r:.80} repeats too much")
        # Copies of the atom, which is read again for each.
        start = self.state()
        ends, optional = [start], []
        for copy in range(max(least, most or 0, 1)):
            if copy:
                self.at = begin
                first, last = self.atom()
            if copy >= least:
                optional += ends
            self.join(ends, first)
            ends = last
        self.at = end
        if most is None:
            self.join(ends, first)
            return start, ends + ([start] if least == 0 else [])
        return (start, ends + optional) if most else (start, [start])

    def atom(self) -> tuple[int, list[int]]:
        character = self.next()
        self.at += 1
        if character == "(":
            return self.group()
        if character in "*+?" or _COUNTS.match(self.pattern, self.at - 1):
            raise PatternError(f"{self.pattern!r:.80} repeats nothing")
        if character == "^":
            made = self.state(place=lambda text, at: at == 0)
        elif character == "$":
            made = self.state(place=lambda text, at: text[at:] in ("", "\n"))
        elif character == ".":
            made = self.state(test=lambda c: c != "\n")
        elif character == "[":
            made = self.state(test=self.members())
        elif character == "\\":
            made = self.escaped()
        else:
            made = self.state(test=lambda c: c == character)
        return made, [made]

    def group(self) -> tuple[int, list[int]]:
        self.depth += 1
        if self.depth > 50:
            raise PatternError(f"{self.pattern!r:.80} is nested too deeply")
        if self.take("?"):
            named = re.compile(r":|P<[A-Za-z_]\w*>").match(self.pattern, self.at)
            if named is None:
                raise PatternError(f"{self.pattern!r:.80} has a group that is not supported")
            self.at = named.end()
        piece = self.choice()
        if not self.take(")"):
            raise PatternError(f"{self.pattern!r:.80} has a ( that nothing closes")
        self.depth -= 1
        return piece

    def escaped(self) -> int:
        character = self.next()
        self.at += 1
        if character in ("A", "Z"):
            place: Place = (
                (lambda text, at: at == 0) if character == "A" else lambda text, at: at == len(text)
            )
            return self.state(place=place)
        if character in ("b", "B"):
            return self.state(place=lambda text, at: _is_edge(text, at) == (character == "b"))
        return self.state(test=self.one_of(character))

    def one_of(self, character: str) -> Test:
        """The characters that stand behind a backslash."""
        if character.lower() in _CLASSES:
            inside = _CLASSES[character.lower()]
            return inside if character.islower() else lambda c: not inside(c)
        if character in _CONTROLS:
            return lambda c: c == _CONTROLS[character]
        if not character or character.isalnum():
            raise PatternError(f"{self.pattern!r:.80} has \\{character}, which is not supported")
        return lambda c: c == character

    def members(self) -> Test:
        """A set of characters, behind its bracket."""
        is_inverse, tests = self.take("^"), []
        is_first = True
        while is_first or not self.take("]"):
            is_first = False
            low = self.next()
            self.at += 1
            if not low:
                raise PatternError(f"{self.pattern!r:.80} has a [ that nothing closes")
            if low == "\\":
                tests.append(self.one_of(self.next()))
                self.at += 1
                continue
            high = low
            if self.next() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                high = self.pattern[self.at + 1]
                self.at += 2
            if high == "\\" or high < low:
                raise PatternError(f"{self.pattern!r:.80} has a range that is not supported")
            tests.append(lambda c, low=low, high=high: low <= c <= high)
        return lambda c: any(test(c) for test in tests) != is_inverse


def _is_edge(text: str, at: int) -> bool:
    word = _CLASSES["w"]
    before, after = at > 0 and word(text[at - 1]), at < len(text) and word(text[at])
    return before != after
