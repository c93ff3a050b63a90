"""Tiny models that every format can describe, and a tokenizer for them.

`transformers` wants the width to be a multiple of the heads; apart from that sizes are primes.
"""

from dataclasses import replace
from functools import cache

import equinox as eqx
import gguf_files as files
import jax
import jax.numpy as jnp
import numpy as np
import tiny

import equigemma as eg
from equigemma import _sentencepiece as spm
from equigemma.config import Dense, LayerConfig, ModelConfig, RopeConfig
from equigemma.tokenizer import SentencePieceTokenizer


VOCAB, WIDTH, HIDDEN, WINDOW = 277, 28, 17, 5


def layer(**options) -> LayerConfig:
    """As in `tiny`, with gates stored as other formats store them."""
    made = tiny.layer(**({"heads": 4, "kv_heads": 2} | options))
    attention = replace(made.attention, qkv_axes="NDH,CKDH")
    return replace(made, attention=attention, ffw=Dense(hidden=HIDDEN))


def model_config(*layers: LayerConfig, final_softcap: float | None = None) -> ModelConfig:
    return ModelConfig(vocab=VOCAB, width=WIDTH, layers=layers, final_softcap=final_softcap)


_LOCAL2 = layer(window=WINDOW, softcap=2.0, post_norm=True)
_GLOBAL2 = layer(softcap=2.0, post_norm=True)
_LOCAL3 = layer(window=WINDOW, qk_norm=True, post_norm=True)
_GLOBAL3 = layer(qk_norm=True, post_norm=True, rope=RopeConfig(theta=1_000_000.0, scale=8.0))

CONFIGS = {
    "gemma1 mqa": model_config(*[layer(heads=7, kv_heads=1)] * 2),
    "gemma1 mha": model_config(*[layer(heads=7, kv_heads=7)] * 2),
    "gemma2": model_config(_LOCAL2, _GLOBAL2, _LOCAL2, final_softcap=3.0),
    "gemma3": model_config(*[_LOCAL3] * 5, _GLOBAL3, _LOCAL3),
}


@cache
def model(config: ModelConfig, dtype=jnp.float32, seed: int = 0) -> eg.Transformer:
    """Random weights. Scales of norms are multiples of 1/256: 1 can be added to them exactly."""
    drawn = tiny.model(config, seed)

    def round_scale(leaf: jax.Array) -> jax.typing.ArrayLike:
        return np.round(np.asarray(leaf) * 256) / 256 if leaf.ndim == 1 else leaf

    return jax.tree.map(lambda leaf: tiny.host(round_scale(leaf), dtype), drawn)


def assert_same(ours: eg.Transformer, theirs: eg.Transformer) -> None:
    """Both models bit for bit."""
    assert ours.config == theirs.config
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert our.dtype == their.dtype
        np.testing.assert_array_equal(np.asarray(our), np.asarray(their))


def vocabulary() -> spm.Vocabulary:
    """The vocabulary of `gguf_files`, as SentencePiece has it."""
    tokens = [token.replace(" ", "▁") for token in files.TOKENS]
    return spm.Vocabulary(tokens, files.SCORES, files.TYPES)


def tokenizer(**options) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(vocabulary(), **options)


@eqx.filter_jit(compiler_options=tiny.QUICK)
def logits(model: eg.Transformer, tokens) -> jax.Array:
    return model(tokens).logits
