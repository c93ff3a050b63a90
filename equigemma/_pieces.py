"""What all tokenizers of one vocabulary share: which pieces steer, and what each of them spells.

How a text without special tokens is cut into pieces is up to the library that does it.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from equigemma import _sentencepiece as spm
from equigemma._typing import Array


# Pieces that steer the model. Some files class them with markup such as <table>, which is text.
_STEERING = re.compile(
    r"<(mask|\d+mass|unused\d+|(start|end)_of_(turn|image|audio)|(image|audio)_soft_token)>"
    r"|\[(multimodal|@BOS@)\]|<\|.+>|<.+\|>"
)


class Pieces:
    """A vocabulary in which the pieces that steer the model are told from those that are text."""

    def __init__(self, vocabulary: spm.Vocabulary):
        """**Raises:** `ValueError` without `<bos>`, `<eos>`, `<pad>` and `<unk>`."""
        tokens = vocabulary.tokens
        self.bos, self.eos, self.pad, self.unknown = (
            _find(tokens, name) for name in ("<bos>", "<eos>", "<pad>", "<unk>")
        )
        self.types = [
            spm.CONTROL if kind == spm.USER_DEFINED and _STEERING.fullmatch(token) else int(kind)
            for token, kind in zip(tokens, vocabulary.types, strict=True)
        ]
        for index in (self.bos, self.eos, self.pad):
            self.types[index] = spm.CONTROL
        self.types[self.unknown] = spm.UNKNOWN
        self.tokens = tokens
        self.spelled = {
            token: index
            for index, (token, kind) in enumerate(zip(tokens, self.types, strict=True))
            if kind in (spm.CONTROL, spm.UNKNOWN)
        }
        # Longest first, so that no special token hides one that begins with it.
        self._lengths = sorted({len(token) for token in self.spelled}, reverse=True)
        self._starts = re.compile(f"[{re.escape(''.join({token[0] for token in self.spelled}))}]")

    def encode(
        self, text: str, plain: Callable[[str], list[int]], *, bos: bool, special: bool
    ) -> list[int]:
        """Ids of a text; `plain` gives those of a text in which nothing is special.

        **Raises:** `ValueError` if the text holds half of a surrogate pair: it has no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Text must be encodable as UTF-8; the character at position {error.start} is "
                f"{text[error.start]!r}, half of a surrogate pair."
            ) from None
        ids = [self.bos] if bos else []
        if not special:
            return ids + plain(text)
        at = 0
        for start, token in self._find_special(text):
            ids += plain(text[at:start])
            ids.append(self.spelled[token])
            at = start + len(token)
        return ids + plain(text[at:])

    def decode(self, ids: Sequence[int] | np.ndarray | Array) -> str:
        """The text of ids; bytes that are no character give U+FFFD.

        **Raises:** `ValueError` if an id is not in the vocabulary, or if `ids` is not one row.
        """
        row = np.asarray(ids)
        if row.ndim != 1:
            raise ValueError(f"decode takes one row of ids, got an array of shape {row.shape}.")
        ids = row.tolist()
        known = {index: self.token_bytes(int(index)) for index in set(ids)}
        return b"".join(known[index] for index in ids).decode(errors="replace")

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes that one piece adds to a text.

        **Raises:** `ValueError` if `index` is not in the vocabulary.
        """
        if not 0 <= index < len(self.tokens):
            raise ValueError(
                f"A token id must be at least 0 and below {len(self.tokens)}, got {index}."
            )
        kind, token = self.types[index], self.tokens[index]
        if kind in (spm.CONTROL, spm.UNKNOWN, spm.UNUSED):
            return b""
        if kind == spm.BYTE:
            return bytes([int(token.strip("<>"), 16)])
        return token.replace("▁", " ").encode()

    def _find_special(self, text: str) -> Iterator[tuple[int, str]]:
        """Place and name of every special token spelled out in a text, from left to right."""
        end = 0
        for match in self._starts.finditer(text):
            start = match.start()
            for length in self._lengths:
                token = text[start : start + length]
                if start >= end and token in self.spelled:
                    yield start, token
                    end = start + len(token)


def _find(tokens: Sequence[str], name: str) -> int:
    try:
        return tokens.index(name)
    except ValueError:
        raise ValueError(f"The vocabulary has no piece called {name}.") from None
