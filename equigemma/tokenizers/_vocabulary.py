"""A vocabulary: control tokens, and the bytes of every piece. All tokenizers share it.

How a text without special tokens is cut into pieces is up to the library that does it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from equigemma._typing import Array
from equigemma.tokenizers import _sentencepiece_model as spm


# Control tokens. Some files class them with markup such as <table>, which is text.
_STEERING = re.compile(
    r"<(mask|\d+mass|unused\d+|(start|end)_of_(turn|image|audio)|(image|audio)_soft_token)>"
    r"|\[(multimodal|@BOS@)\]|<\|.+>|<.+\|>"
)
_MARKUP = re.compile(r"[<\[].+[>\]]")
# End-of-generation tokens of every Gemma. After the last one it is a tool's turn.
_ENDS = ("<eos>", "<end_of_turn>", "<turn|>", "<|tool_response>")
# Some converters write these as ordinary pieces, and no Gemma has an ordinary piece of that name.
_NEVER_TEXT = frozenset(
    [*_ENDS, "<start_of_turn>", "<|turn>", "<start_of_image>", "<end_of_image>"]
)


class Pieces:
    """A vocabulary in which control tokens are told from pieces that are text."""

    def __init__(self, vocabulary: spm.Vocabulary):
        """**Raises:** `ValueError` if the vocabulary states no id of `bos`, `eos`, `pad` or `unk`
        and has no piece spelled so between angle brackets, or if an id is not in it.
        """
        tokens = vocabulary.tokens
        self.bos, self.eos, self.pad, self.unknown = (
            _find(vocabulary, name) for name in ("bos", "eos", "pad", "unk")
        )
        self.types = [
            spm.CONTROL
            if (kind == spm.USER_DEFINED and _STEERING.fullmatch(token))
            or (kind == spm.NORMAL and token in _NEVER_TEXT)
            else int(kind)
            for token, kind in zip(tokens, vocabulary.types, strict=True)
        ]
        for index in (self.bos, self.eos, self.pad):
            # A file may end texts with a line end, a letter or a byte, which stays text.
            if _MARKUP.fullmatch(tokens[index]) and self.types[index] != spm.BYTE:
                self.types[index] = spm.CONTROL
        self.types[self.unknown] = spm.UNKNOWN
        self.tokens = tokens
        self.spelled = {
            token: index
            for index, (token, kind) in enumerate(zip(tokens, self.types, strict=True))
            if kind in (spm.CONTROL, spm.UNKNOWN)
        }
        ids = {"bos": self.bos, "eos": self.eos, "pad": self.pad, "unk": self.unknown}
        names = {name: tokens[index] for name, index in ids.items()} | dict(vocabulary.names)
        self.names = {name: spelling for name, spelling in names.items() if spelling is not None}
        self.chat_bos = vocabulary.chat_bos
        ends = (self.spelled[name] for name in _ENDS if name in self.spelled)
        self.stop = tuple(dict.fromkeys([self.eos, *ends, *vocabulary.stop]))
        # Longest first, so that no special token hides one that begins with it.
        self._lengths = sorted({len(token) for token in self.spelled}, reverse=True)
        self._starts = re.compile(f"[{re.escape(''.join({token[0] for token in self.spelled}))}]")

    def encode(
        self, text: str, plain: Callable[[str], list[int]], *, bos: bool, special: bool
    ) -> list[int]:
        """Ids of a text; `plain` gives those of a text in which nothing is special.

        **Raises:** `ValueError` if the text holds half of a surrogate pair: it has no UTF-8;
        `TypeError` if it is no string.
        """
        if not isinstance(text, str):
            hint = "; text.decode() makes one of bytes" if isinstance(text, bytes) else ""
            hint = "; encode a list one by one" if isinstance(text, list | tuple) else hint
            raise TypeError(f"`text` must be a str, got {_shortened(text)}{hint}.")
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
        for start, token, index in self.find_special(text):
            if start >= at:
                ids += plain(text[at:start])
                ids.append(index)
                at = start + len(token)
        return ids + plain(text[at:])

    def decode(self, ids: Sequence[Any] | np.ndarray | Array | int) -> str:
        """The text of ids, or of one id; bytes that are no character give U+FFFD.

        **Raises:** `ValueError` for a negative id or more than one row; `TypeError` if `ids` are
        not whole numbers.
        """
        try:
            row = np.asarray(ids)
        except ValueError as error:
            raise ValueError(
                "`ids` must be one row of ids, got rows of several lengths."
            ) from error
        if row.ndim > 1:
            raise ValueError(f"`ids` must be one row of ids, got an array of shape {row.shape}.")
        if row.size and row.dtype.kind not in "iu":
            raise TypeError(
                f"`ids` must be whole numbers, as `encode` gives them, got {_shortened(ids)}."
            )
        ids = row.reshape(-1).tolist()
        known = {index: self.token_bytes(index) for index in set(ids)}
        return b"".join(known[index] for index in ids).decode(errors="replace")

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes that one piece adds to a text.

        None for an id behind the last piece: embeddings are often padded to more rows.

        **Raises:** `ValueError` if `index` is negative.
        """
        if index < 0:
            raise ValueError(f"A token id must be at least 0, got {index}.")
        if index >= len(self.tokens):
            return b""
        kind, token = self.types[index], self.tokens[index]
        if kind in (spm.CONTROL, spm.UNKNOWN, spm.UNUSED):
            return b""
        if kind == spm.BYTE:
            return bytes([int(token.strip("<>"), 16)])
        return token.replace("▁", " ").encode()

    def find_special(self, text: str) -> Iterator[tuple[int, str, int]]:
        """Start, spelling and id of every control token spelled out in a text, left to right.

        At one place it is the longest. The next may overlap it.
        """
        for match in self._starts.finditer(text):
            start = match.start()
            for length in self._lengths:
                index = self.spelled.get(token := text[start : start + length])
                if index is not None:
                    yield start, token, index
                    break


def _find(vocabulary: spm.Vocabulary, name: str) -> int:
    index = vocabulary.ids.get(name)
    if index is not None and 0 <= index < len(vocabulary.tokens):
        return index
    if index is not None:
        raise ValueError(
            f"The id of its {name} token is {index}, and it has {len(vocabulary.tokens)} tokens."
        )
    try:
        return vocabulary.tokens.index(f"<{name}>")
    except ValueError:
        raise ValueError(f"The vocabulary has no piece called <{name}>.") from None


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
