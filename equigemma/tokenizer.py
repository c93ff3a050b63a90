"""Text to token ids and back. What a conversation looks like is not decided here."""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import numpy as np

from equigemma import _sentencepiece as spm
from equigemma._typing import Array, typed


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens that stand for no text. None: the vocabulary has no such token."""

    bos: int
    """Before every text."""
    eos: int
    """After a document."""
    pad: int
    unknown: int | None = None
    start_of_turn: int | None = None
    end_of_turn: int | None = None

    @property
    def stop(self) -> tuple[int, ...]:
        """Ids after which a model has nothing more to say."""
        return (self.eos,) if self.end_of_turn is None else (self.eos, self.end_of_turn)


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    @property
    def special(self) -> SpecialTokens:
        """Ids of the tokens that stand for no text."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are below it."""
        ...

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Ids of a text, after that of "beginning of sequence" if `bos`.

        Special tokens spelled out in the text, such as `<end_of_turn>`, are text like any other
        unless `special` is set: only then do they become the ids that steer the model.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray | Array) -> str:
        """The text of ids; special tokens have none. Bytes that are no character give U+FFFD."""
        ...

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes that one token adds to a text: maybe part of a character, maybe none."""
        ...


class StreamingDecoder:
    """Text from ids that come one at a time; all it returns, joined, is `decode` of all ids.

    ```python
    >>> from equigemma.tokenizer import StreamingDecoder
    >>> class Bytes:
    ...     def token_bytes(self, index): return bytes([index])
    >>> stream = StreamingDecoder(Bytes())
    >>> [stream.push(index) for index in "né".encode()], stream.finish()
    (['n', '', 'é'], '')

    ```
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """The text that this token completes; empty while a character is still missing bytes."""
        return self._utf8.decode(self._tokenizer.token_bytes(int(index)))

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD for a character cut off, else nothing."""
        return self._utf8.decode(b"", True)


# Pieces that steer the model. Some files class them with markup such as <table>, which is text.
_STEERING = re.compile(
    r"<(mask|\d+mass|unused\d+|(start|end)_of_(turn|image|audio)|(image|audio)_soft_token)>"
    r"|\[(multimodal|@BOS@)\]|<\|.+>|<.+\|>"
)


class SentencePieceTokenizer:
    """The tokenizer that Gemma was trained with, run by the `sentencepiece` library.

    A text comes back from `decode(encode(text))` unchanged, but for U+2581 (▁), which stands for a
    space inside the vocabulary and comes back as one.
    """

    def __init__(self, vocabulary: spm.Vocabulary):
        """Builds the model in memory: a third of a second for a quarter of a million pieces.

        **Raises:** `ValueError` if the pieces are no SentencePiece vocabulary or lack one of
        `<bos>`, `<eos>`, `<pad>` and `<unk>`; `ImportError` if `sentencepiece` is not installed.
        """
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ImportError(
                "Tokenizers need the package sentencepiece, which is not installed: "
                'pip install "equigemma[gguf]".'
            ) from error

        tokens = vocabulary.tokens
        bos, eos, pad, unknown = (
            _find(tokens, name) for name in ("<bos>", "<eos>", "<pad>", "<unk>")
        )
        types = [
            spm.CONTROL if kind == spm.USER_DEFINED and _STEERING.fullmatch(token) else int(kind)
            for token, kind in zip(tokens, vocabulary.types, strict=True)
        ]
        for index in (bos, eos, pad):
            types[index] = spm.CONTROL
        types[unknown] = spm.UNKNOWN
        model = spm.to_model(
            vocabulary._replace(types=types), unknown=unknown, bos=bos, eos=eos, pad=pad
        )
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"sentencepiece refuses this vocabulary: {error}") from error

        self._spelled = {
            token: index
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (spm.CONTROL, spm.UNKNOWN)
        }
        # Longest first, so that no special token hides one that begins with it.
        self._lengths = sorted({len(token) for token in self._spelled}, reverse=True)
        self._starts = re.compile(f"[{re.escape(''.join({token[0] for token in self._spelled}))}]")
        self._special = SpecialTokens(
            bos=bos,
            eos=eos,
            pad=pad,
            unknown=unknown,
            start_of_turn=self._spelled.get("<start_of_turn>"),
            end_of_turn=self._spelled.get("<end_of_turn>"),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The tokenizer of a SentencePiece `.model` file.

        **Raises:** `ValueError` if the file is no such model, or not that of a Gemma.
        """
        try:
            return cls(spm.from_model(Path(path).read_bytes()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def special(self) -> SpecialTokens:
        return self._special

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @typed
    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """See `Tokenizer.encode`.

        **Raises:** `ValueError` if the text holds half of a surrogate pair: it has no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Text must be encodable as UTF-8; the character at position {error.start} is "
                f"{text[error.start]!r}, half of a surrogate pair."
            ) from None
        ids = [self._special.bos] if bos else []
        if not special:
            return ids + self._processor.encode(text)
        at = 0
        for start, token in self._find_special(text):
            ids += self._processor.encode(text[at:start])
            ids.append(self._spelled[token])
            at = start + len(token)
        return ids + self._processor.encode(text[at:])

    @typed
    def decode(self, ids: Sequence[int] | np.ndarray | Array) -> str:
        """See `Tokenizer.decode`.

        **Raises:** `ValueError` if an id is not in the vocabulary, or if `ids` is not one row.
        """
        row = np.asarray(ids)
        if row.ndim != 1:
            raise ValueError(f"decode takes one row of ids, got an array of shape {row.shape}.")
        ids = row.tolist()
        known = {index: self.token_bytes(int(index)) for index in set(ids)}
        return b"".join(known[index] for index in ids).decode(errors="replace")

    @typed
    def token_bytes(self, index: int) -> bytes:
        """See `Tokenizer.token_bytes`.

        **Raises:** `ValueError` if `index` is not in the vocabulary.
        """
        if not 0 <= index < self.vocab_size:
            raise ValueError(
                f"A token id must be at least 0 and below {self.vocab_size}, got {index}."
            )
        processor = self._processor
        if processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
            return b""
        piece = processor.id_to_piece(index)
        if processor.is_byte(index):
            return bytes([int(piece.strip("<>"), 16)])
        return piece.replace("▁", " ").encode()

    def __repr__(self) -> str:
        return f"SentencePieceTokenizer({self.vocab_size} tokens)"

    def _find_special(self, text: str) -> Iterator[tuple[int, str]]:
        """Place and name of every special token spelled out in a text, from left to right."""
        end = 0
        for match in self._starts.finditer(text):
            start = match.start()
            for length in self._lengths:
                token = text[start : start + length]
                if start >= end and token in self._spelled:
                    yield start, token
                    end = start + len(token)


def _find(tokens: Sequence[str], name: str) -> int:
    try:
        return tokens.index(name)
    except ValueError:
        raise ValueError(f"The vocabulary has no piece called {name}.") from None
