"""The tokenizer that a GGUF file carries.

**Source:** ggml `docs/gguf.md`; llama.cpp `src/llama-vocab.cpp`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equigemma._sentencepiece import Vocabulary
from equigemma.checkpoint._errors import CheckpointError
from equigemma.tokenizer import SentencePieceTokenizer


# What no Gemma tokenizer does. Files that do not say so are taken to mean Gemma's way.
_NEVER = (
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.precompiled_charsmap",
)


def token_count(metadata: Mapping[str, Any]) -> int:
    """Number of tokens in the file's vocabulary."""
    return len(_list(metadata, "tokenizer.ggml.tokens", str))


def read_tokenizer(metadata: Mapping[str, Any], origin: Path) -> SentencePieceTokenizer:
    """The tokenizer made from the vocabulary of the file `origin`.

    **Raises:** `CheckpointError` if it has none, or one that is not SentencePiece's or not Gemma's.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "llama":
        raise CheckpointError(
            f"its tokenizer is of type {kind!r}; only 'llama', which is SentencePiece, is read."
        )
    for key in _NEVER:
        if metadata.get(key):
            raise CheckpointError(f"its {key} is set, which is so in no Gemma.")
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    scores = _list(metadata, "tokenizer.ggml.scores", float)
    types = _list(metadata, "tokenizer.ggml.token_type", int)
    if not len(tokens) == len(scores) == len(types):
        raise CheckpointError(
            f"its vocabulary has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types."
        )
    # Pieces that are matched as they stand are stored with spaces, all others with their sign.
    pieces = [token.replace(" ", "▁") for token in tokens]
    try:
        return SentencePieceTokenizer(Vocabulary(pieces, scores, types), origin=origin)
    except ValueError as error:
        raise CheckpointError(f"its vocabulary is damaged. {error}") from error


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(key)
    # A list in a file has one type for all.
    if not isinstance(values, list) or not values or not isinstance(values[0], kind):
        raise CheckpointError(f"its tokenizer lacks {key}, or it is no list of the right type.")
    return values
