"""The tokenizer that a GGUF file carries.

**Source:** ggml `docs/gguf.md`; llama.cpp `src/llama-vocab.cpp`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equigemma._sentencepiece import Vocabulary
from equigemma._tokenizer_json import merge_scores
from equigemma.checkpoint._errors import CheckpointError
from equigemma.tokenizer import SentencePieceTokenizer


_MERGES = "gemma4"
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
    if kind not in ("llama", _MERGES):
        raise CheckpointError(
            f"its tokenizer is of type {kind!r}; only 'llama', which is SentencePiece, and "
            f"{_MERGES!r}, which are its merges, are read."
        )
    for key in _NEVER:
        if metadata.get(key):
            raise CheckpointError(f"its {key} is set, which is so in no Gemma.")
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    merges = _list(metadata, "tokenizer.ggml.merges", str) if kind == _MERGES else None
    scores = tokens if merges else _list(metadata, "tokenizer.ggml.scores", float)
    types = _list(metadata, "tokenizer.ggml.token_type", int)
    if not len(tokens) == len(scores) == len(types):
        raise CheckpointError(
            f"its vocabulary has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types."
        )
    # Pieces that are matched as they stand are stored with spaces, all others with their sign.
    pieces = [token.replace(" ", "▁") for token in tokens]
    try:
        # Merges say what scores would; those that stand beside them say nothing.
        scores = merge_scores(pieces, merges) if merges else scores
        return SentencePieceTokenizer(Vocabulary(pieces, scores, types), origin=origin)
    except ValueError as error:
        raise CheckpointError(f"its vocabulary is damaged. {error}") from error


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(key)
    # A list in a file has one type for all.
    if not isinstance(values, list) or not values or not isinstance(values[0], kind):
        raise CheckpointError(f"its tokenizer lacks {key}, or it is no list of the right type.")
    return values
