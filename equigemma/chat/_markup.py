"""Text with special tokens in it, kept apart: what a person writes never becomes one.

A conversation is spelled as a list of parts. Neighbouring texts are joined before they become
tokens, so that a format cuts a text only where it puts a special token.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from equigemma.tokenizer import Tokenizer


@dataclass(frozen=True)
class Special:
    """A special token, by its spelling."""

    spelling: str


Part = str | Special


def special_id(tokenizer: Tokenizer, spelling: str) -> int | None:
    """The id of the special token spelled so; None: the vocabulary has none."""
    ids = tokenizer.encode(spelling, bos=False, special=True)
    if len(ids) == 1 and not tokenizer.token_bytes(ids[0]):
        return ids[0]
    return None


def encode(tokenizer: Tokenizer, parts: Iterable[Part]) -> list[int]:
    """Ids of a text in parts; only a `Special` becomes a special token.

    **Raises:** `ValueError` if the vocabulary lacks one.
    """
    ids: list[int] = []
    text = ""
    for part in (*parts, Special("")):
        if isinstance(part, str):
            text += part
            continue
        if text:
            ids += tokenizer.encode(text, bos=False)
            text = ""
        if part.spelling:
            ids.append(_required(tokenizer, part.spelling))
    return ids


# What a special token can look like. Whether it is one is asked of the vocabulary.
_CANDIDATE = re.compile(r"<[^<>\s]{1,64}>|\[[^\[\]\s]{1,64}\]")


def split(tokenizer: Tokenizer, text: str) -> Iterator[Part]:
    """The parts of a text in which every special token spelled out is meant to be one."""
    at = look = 0
    while match := _CANDIDATE.search(text, look):
        if special_id(tokenizer, match[0]) is None:
            # One may begin within: [<bos>] is none, but has one in it.
            look = match.start() + 1
            continue
        yield text[at : match.start()]
        yield Special(match[0])
        at = look = match.end()
    yield text[at:]


def _required(tokenizer: Tokenizer, spelling: str) -> int:
    index = special_id(tokenizer, spelling)
    if index is None:
        raise ValueError(
            f"This way to write a conversation needs the special token {spelling}, which the "
            f"vocabulary does not have. Choose another format."
        )
    return index
