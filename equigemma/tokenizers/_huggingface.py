"""The tokenizer of a `tokenizer.json`, run by the library that the file belongs to."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from equigemma._typing import Array
from equigemma.tokenizers import _sentencepiece_model as spm
from equigemma.tokenizers._tokenizer import SpecialTokens, special_tokens
from equigemma.tokenizers._tokenizer_json import Merges, from_json
from equigemma.tokenizers._vocabulary import Pieces


def read_merges(path: Path) -> Merges:
    """Vocabulary and merges of a `tokenizer.json`.

    **Raises:** `ValueError` if the file is none, or not that of a Gemma.
    """
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
        if not isinstance(data, dict):
            raise ValueError("It holds no JSON object.")
        return from_json(data)
    except RecursionError as error:
        raise ValueError("It is nested too deeply.") from error


class HuggingFaceTokenizer:
    """Gemma's tokenizer, run by the `tokenizers` library.

    It gives the ids that `SentencePieceTokenizer` gives. The library itself would take a special
    token that is spelled out in a text for one, and would miss runs of spaces that are one piece.
    """

    def __init__(self, merges: Merges, *, origin: Path | None = None):
        """Builds the model in memory: about a second for a quarter of a million pieces.

        **Arguments:** `origin`: the checkpoint that the vocabulary is part of, as in
        `SentencePieceTokenizer`.

        **Raises:** `ValueError` if the library refuses the merges; `ImportError` if `tokenizers` is
        not installed.
        """
        try:
            from tokenizers import AddedToken, Tokenizer
            from tokenizers.models import BPE
            from tokenizers.normalizers import Replace
        except ImportError as error:
            raise ImportError(
                "Reading tokenizer.json needs the package tokenizers, which is not installed: "
                'pip install "equigemma[hf]".'
            ) from error
        self.vocabulary = merges.vocabulary
        self.origin = origin
        self._pieces = pieces = Pieces(merges.vocabulary)
        self._special = special_tokens(pieces)
        tokens = merges.vocabulary.tokens
        vocab = {token: index for index, token in enumerate(tokens)}
        model = BPE(
            vocab=vocab,
            # A control token is never made from a text by merges.
            merges=[pair for pair in merges.pairs if pair[0] + pair[1] not in pieces.spelled],
            unk_token=tokens[pieces.unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = Replace(" ", "▁")
        # Looked for once spaces are written as ▁: pieces made of spaces are among them.
        self._tokenizer.add_tokens(
            [
                AddedToken(token, normalized=True)
                for token, kind in zip(tokens, pieces.types, strict=True)
                if kind == spm.USER_DEFINED
            ]
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The tokenizer of a `tokenizer.json`.

        **Raises:** `ValueError` if the file is none, or not that of a Gemma.
        """
        path = Path(path)
        try:
            return cls(read_merges(path), origin=path.parent)
        except ValueError as error:
            raise ValueError(f"{path} is not a tokenizer that can be used. {error}") from error

    @property
    def special(self) -> SpecialTokens:
        return self._special

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """See `Tokenizer.encode`.

        **Raises:** `ValueError` if the text holds half of a surrogate pair: it has no UTF-8;
        `TypeError` if it is no string.
        """
        return self._pieces.encode(text, self._plain, bos=bos, special=special)

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
        return f"HuggingFaceTokenizer({self.vocab_size} tokens)"

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids
