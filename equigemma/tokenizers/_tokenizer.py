"""Text to token ids and back. What a conversation looks like is not decided here."""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from equigemma._arguments import check_kind
from equigemma._typing import Array
from equigemma.tokenizers import _sentencepiece_model as spm
from equigemma.tokenizers._vocabulary import Pieces


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
    names: Mapping[str, str] = field(
        default_factory=lambda: {name: f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
        compare=False,
    )
    """Spellings of `bos`, `eos`, `pad` and `unk`, which chat templates are given."""
    chat_bos: bool = field(default=False, compare=False)
    """Whether `bos` comes before a conversation whose chat template does not write it: so it is
    in llama.cpp, for GGUF files, and not in `transformers`."""
    stop: tuple[int, ...] = ()
    """End-of-generation ids: the union of what the files of a checkpoint state and what the
    vocabulary spells. By default `eos` and `end_of_turn`."""

    def __post_init__(self):
        if not self.stop:
            ends = (self.eos, self.end_of_turn)
            stop = tuple(dict.fromkeys(index for index in ends if index is not None))
            object.__setattr__(self, "stop", stop)


@runtime_checkable
class Tokenizer(Protocol):
    """The protocol of a tokenizer."""

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

    def decode(self, ids: Sequence[Any] | np.ndarray | Array | int) -> str:
        """The text of ids; special tokens have none. Bytes that are no character give U+FFFD.

        An id behind the last token, for which an embedding may have a row all the same, has no
        text either, as in `transformers`.
        """
        ...

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes that one token adds to a text: maybe part of a character, maybe none."""
        ...

    def find_special(self, text: str) -> Iterator[tuple[int, str, int]]:
        """Start, spelling and id of every special token spelled out in a text.

        At one place it is the longest. The next may overlap it.
        """
        ...


def check_tokenizer(value: object) -> None:
    """Refuses what is no tokenizer: one for other libraries, a model, a path.

    One's own need not have what is never asked of it.

    **Arguments:** `value`: what was given as a tokenizer.

    **Raises:** `TypeError`.
    """
    if not hasattr(value, "special") or not hasattr(value, "encode"):
        check_kind("tokenizer", value, Tokenizer, "`eg.load` gives it beside the model.")


class StreamingDecoder:
    """Text from ids that come one at a time; all it returns, joined, is `decode` of all ids.

    ```python
    >>> from equigemma.tokenizers._tokenizer import StreamingDecoder
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


class SentencePieceTokenizer:
    """The tokenizer that Gemma was trained with, run by the `sentencepiece` library.

    A text comes back from `decode(encode(text))` unchanged, but for U+2581 (▁), which stands for a
    space inside the vocabulary and comes back as one.
    """

    def __init__(self, vocabulary: spm.Vocabulary, *, origin: Path | None = None):
        """Builds the model in memory: a third of a second for a quarter of a million pieces.

        **Arguments:**

        - `vocabulary`: pieces, scores and types, as a checkpoint has them.
        - `origin`: the checkpoint that the vocabulary is part of. What else it holds, such as a
          chat template, goes along when a model is saved with this tokenizer.

        **Raises:** `ValueError` if the pieces are no SentencePiece vocabulary, or if it has no
        token for one of `bos`, `eos`, `pad` and `unk`; `ImportError` if `sentencepiece` is not
        installed.
        """
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ImportError(
                "Tokenizers need the package sentencepiece, which is not installed: "
                'pip install "equigemma[gguf]".'
            ) from error

        self.vocabulary = vocabulary
        self.origin = origin
        self._pieces = pieces = Pieces(vocabulary)
        model = spm.to_model(
            vocabulary._replace(types=pieces.types),
            unknown=pieces.unknown,
            bos=pieces.bos,
            eos=pieces.eos,
            pad=pieces.pad,
        )
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"sentencepiece refuses this vocabulary: {error}") from error
        self._special = special_tokens(pieces)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The tokenizer of a SentencePiece `.model` file.

        **Raises:** `ValueError` if the file is no such model, or not that of a Gemma.
        """
        try:
            return cls(spm.from_model(Path(path).read_bytes()), origin=Path(path).parent)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def special(self) -> SpecialTokens:
        return self._special

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """See `Tokenizer.encode`.

        **Raises:** `ValueError` if the text holds half of a surrogate pair: it has no UTF-8;
        `TypeError` if it is no string.
        """
        return self._pieces.encode(text, self._processor.encode, bos=bos, special=special)

    def decode(self, ids: Sequence[Any] | np.ndarray | Array | int) -> str:
        """See `Tokenizer.decode`. A single id may be an integer or an array without axes.

        **Raises:** `ValueError` for a negative id or more than one row; `TypeError` if `ids` are
        not whole numbers.
        """
        return self._pieces.decode(ids)

    def token_bytes(self, index: int) -> bytes:
        """See `Tokenizer.token_bytes`.

        **Raises:** `ValueError` if `index` is negative.
        """
        return self._pieces.token_bytes(index)

    def find_special(self, text: str) -> Iterator[tuple[int, str, int]]:
        """See `Tokenizer.find_special`."""
        return self._pieces.find_special(text)

    def __repr__(self) -> str:
        return f"SentencePieceTokenizer({self.vocab_size} tokens)"


def special_tokens(pieces: Pieces) -> SpecialTokens:
    """The ids of a vocabulary's special tokens.

    **Arguments:** `pieces`: the vocabulary.

    **Returns:** ids; None for a token of conversations that it does not have.
    """
    return SpecialTokens(
        bos=pieces.bos,
        eos=pieces.eos,
        pad=pieces.pad,
        unknown=pieces.unknown,
        start_of_turn=pieces.spelled.get("<start_of_turn>"),
        end_of_turn=pieces.spelled.get("<end_of_turn>"),
        names=pieces.names,
        chat_bos=pieces.chat_bos,
        stop=pieces.stop,
    )
