"""One run of a chat template: the string that it gives, and whose each character of it is.

A template puts texts between special tokens, and gives back one string. In that string nobody could
tell a special token of the template from one that somebody has spelled out in a message. So it runs
twice: with the conversation as it is, which gives the string, and with strings that know where
their characters come from (see `_provenance`). Where a template does to them what those do not
follow, it runs once more with the signs in question replaced in the conversation by others. Where
the runs differ, nothing is known.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from types import CodeType
from typing import Any

from equigemma.chat._provenance import OWN, SAID, UNKNOWN, Text, origin
from equigemma.tokenizers import Tokenizer


class Rendering:
    """A template and what it is given; texts of the conversation are marked as `SAID`."""

    def __init__(self, programs: tuple[CodeType, CodeType], variables: Mapping[str, Any]):
        """**Arguments:** `programs`: the template compiled, and compiled so that it marks what is
        its own."""
        self._programs = programs
        self._variables = variables
        self._texts = list(_texts(variables))
        self._size = sum(map(len, self._texts)), len(variables["messages"])
        self._now = datetime.now()

    def text(self) -> Text:
        """What the template makes of it.

        **Raises:** `ValueError` if the template fails, or does not want such a conversation.
        """
        plain = self._run(0, _replaced(self._variables, {}))
        marked = self._run(1, self._variables)
        return marked if isinstance(marked, Text) and marked == plain else Text(plain, UNKNOWN)

    def ids(self, tokenizer: Tokenizer, text: Text) -> list[int]:
        """The ids of `text`, or of its beginning: special tokens of the template are special, and
        no others.

        **Raises:** `ValueError` if it cannot be told whose one of them is.
        """
        plain = str.__str__(text)
        found = list(tokenizer.find_special(plain))
        letters = self._origin(text, [spelling for *_, spelling, _ in found])
        ids: list[int] = []
        at = 0
        for start, spelling, index in found:
            end = start + len(spelling)
            if start >= at and self._is_own(spelling, letters[start:end]):
                ids += tokenizer.encode(plain[at:start], bos=False) if start > at else []
                ids.append(index)
                at = end
        return ids + (tokenizer.encode(plain[at:], bos=False) if plain[at:] else [])

    def _origin(self, text: Text, spellings: Iterable[str]) -> str:
        """The origin of each character, as far as it matters whose these special tokens are."""
        letters = origin(text)
        if UNKNOWN not in letters:
            return letters
        signs = sorted({sign for spelling in spellings for sign in (spelling[0], spelling[-1])})
        others = _unused(self._texts, len(signs))
        hidden = self._run(0, _replaced(self._variables, dict(zip(signs, others, strict=True))))
        back = hidden.translate(str.maketrans(others, "".join(signs)))
        if not back.startswith(text):
            return letters
        return "".join(
            letter if letter != UNKNOWN else _seen(sign, other, signs)
            for letter, sign, other in zip(letters, text, hidden, strict=False)
        )

    def _is_own(self, spelling: str, letters: str) -> bool:
        """Whether a special token is the template's own, all of it."""
        if SAID in letters or UNKNOWN not in letters:
            return SAID not in letters
        # It is if the template begins and ends it, and nothing that was said could be within.
        words = (text.strip() for text in self._texts)
        if letters[0] == letters[-1] == OWN and not any(w in spelling[1:-1] for w in words if w):
            return True
        raise ValueError(
            f"The chat template makes {spelling} in a way that leaves open whether it is its own "
            "or somebody has written it in a message: take such spellings out of the messages, or "
            "use another format."
        )

    def _run(self, program: int, variables: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError

        from equigemma.chat import _program

        code = self._programs[program]
        try:
            return _program.run(code, variables, size=self._size, now=self._now)
        except TemplateError as error:
            raise ValueError(
                f"The chat template stops at this conversation: {reason(error)}."
            ) from error


def reason(error: Exception) -> str:
    """What an error of Jinja's says, as a part of a sentence."""
    return str(error).rstrip(".") or type(error).__name__


def _seen(sign: str, other: str, signs: list[str]) -> str:
    """Whose a character is that is `other` once what was said has no `signs`."""
    if sign != other:
        return SAID
    return OWN if sign in signs else UNKNOWN


def _replaced(value: Any, signs: Mapping[str, str]) -> Any:
    """Ordinary strings, with signs replaced in what was said."""
    match value:
        case Text():
            pairs = zip(origin(value), str.__str__(value), strict=True)
            hidden = (signs.get(sign, sign) if letter == SAID else sign for letter, sign in pairs)
            return "".join(hidden) if signs else str.__str__(value)
        case dict():
            return {_replaced(key, signs): _replaced(item, signs) for key, item in value.items()}
        case list():
            return [_replaced(item, signs) for item in value]
    return value


def _unused(texts: Iterable[str], count: int) -> str:
    """Characters that are in none of the texts: patterns of dots, which print as they are, or
    such that Unicode leaves to private use."""
    used = set().union(*texts)
    codes = (*range(0x2800, 0x2900), *range(0xE000, 0xF900), *range(0xF0000, 0x10FFFE))
    return "".join([char for char in map(chr, codes) if char not in used][:count])


def _texts(value: Any) -> Iterator[str]:
    """Every text in what was said, names included."""
    match value:
        case Text():
            if SAID in origin(value):
                yield str.__str__(value)
        case dict():
            for key, item in value.items():
                yield from _texts(key)
                yield from _texts(item)
        case list():
            for item in value:
                yield from _texts(item)
