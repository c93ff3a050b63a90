"""A tokenizer with the special tokens of Gemma 3 or 4, and tiny models that babble with it."""

from dataclasses import replace
from functools import cache

import gguf_files
import tiny

import equigemma as eg
from equigemma.config import ModelConfig
from equigemma.tokenizers import SentencePieceTokenizer
from equigemma.tokenizers import _sentencepiece_model as spm


GEMMA3 = ("<start_of_turn>", "[multimodal]")
GEMMA4 = (
    *("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", '<|"|>'),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
)


@cache
def tokenizer(special: tuple[str, ...] = GEMMA3) -> SentencePieceTokenizer:
    """All bytes, a few letters and words, and special tokens."""
    pieces = [(token, spm.USER_DEFINED) for token in (*special, "\n\n", "▁▁")]
    if "<start_of_turn>" not in special:
        # Gemma 4 has no such token.
        tokens = [token.replace("<end_of_turn>", "<unused0>") for token in gguf_files.TOKENS]
    else:
        tokens = gguf_files.TOKENS
    tokens = [*tokens, *(token for token, _ in pieces)]
    types = [*gguf_files.TYPES, *(kind for _, kind in pieces)]
    scores = [-float(index) for index in range(len(tokens))]
    return SentencePieceTokenizer(spm.Vocabulary(tokens, scores, types))


@cache
def model(config: ModelConfig = tiny.GEMMA3, special: tuple[str, ...] = GEMMA3) -> eg.Transformer:
    """Random weights over that vocabulary."""
    return tiny.model(replace(config, vocab=tokenizer(special).vocab_size))
