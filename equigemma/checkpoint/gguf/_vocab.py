"""The tokenizer that a GGUF file carries.

Which tokens end a generation is decided as llama.cpp does: those whose ids the file states, and
those of a list of spellings, which are control tokens whatever their type in the file.

**Source:** ggml `docs/gguf.md`; llama.cpp `src/llama-vocab.cpp`, there `special_eog_ids`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.tokenizers import SentencePieceTokenizer
from equigemma.tokenizers._sentencepiece_model import CONTROL, Vocabulary
from equigemma.tokenizers._tokenizer_json import merge_scores


_MERGES = "gemma4"
# What no Gemma tokenizer does. Files that do not say so are taken to mean Gemma's way.
_NEVER = (
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.precompiled_charsmap",
)

_IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
}
_STOP = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
# llama.cpp has </s> too, which is markup in every Gemma, and the names of harmony, which no Gemma
# has.
_ENDS = frozenset(
    "<eos> <end_of_turn> <turn|> <|tool_response> <|im_end|> <|eot_id|> <|eom_id|> <|end|> "
    "<|endoftext|> <|end_of_text|> <EOT> _<EOT> [EOT] [EOS] <end_of_utterance>".split()
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
    ends = [index for index, token in enumerate(tokens) if token in _ENDS]
    types = list(types)
    for index in ends:
        types[index] = CONTROL
    # Pieces that are matched as they stand are stored with spaces, all others with their sign.
    pieces = [
        token if kind == CONTROL else token.replace(" ", "▁")
        for token, kind in zip(tokens, types, strict=True)
    ]
    ids = {name: index for name, key in _IDS.items() if (index := _id(metadata, key)) is not None}
    stated = [index for key in _STOP if (index := _id(metadata, key)) is not None]
    try:
        # Merges say what scores would; those that stand beside them say nothing.
        scores = merge_scores(pieces, merges) if merges else scores
        begins = metadata.get("tokenizer.ggml.add_bos_token") is not False
        vocabulary = Vocabulary(pieces, scores, types, ids, stop=(*stated, *ends), chat_bos=begins)
        return SentencePieceTokenizer(vocabulary, origin=origin)
    except ValueError as error:
        raise CheckpointError(f"its vocabulary is damaged. {error}") from error


def _id(metadata: Mapping[str, Any], key: str) -> int | None:
    """The id of a token. One that is not in the vocabulary is no statement, as in llama.cpp."""
    index = metadata.get(key)
    is_token = type(index) is int and 0 <= index < token_count(metadata)
    return index if is_token else None


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(key)
    # A list in a file has one type for all.
    if not isinstance(values, list) or not values or not isinstance(values[0], kind):
        raise CheckpointError(f"its tokenizer lacks {key}, or it is no list of the right type.")
    return values
