"""Text with special tokens in it, kept apart: what a person writes never becomes one.

A conversation is spelled as a list of parts. Neighbouring texts are joined before they become
tokens, so that a format cuts a text only where it puts a special token.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from equigemma.tokenizers import Tokenizer


@dataclass(frozen=True)
class Special:
    """A special token, by its spelling."""

    spelling: str


Part = str | Special


def special_id(tokenizer: Tokenizer, spelling: str) -> int | None:
    """The id of the special token spelled so; None: the vocabulary has none."""
    found = next(tokenizer.find_special(spelling), None)
    return found[2] if found is not None and found[:2] == (0, spelling) else None


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


def _required(tokenizer: Tokenizer, spelling: str) -> int:
    if spelling == "<bos>":
        # Some vocabularies call it otherwise.
        return tokenizer.special.bos
    index = special_id(tokenizer, spelling)
    if index is None:
        raise ValueError(
            f"This way to write a conversation needs the special token {spelling}, which the "
            f"vocabulary does not have. Choose another format."
        )
    return index
