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
from equigemma.config import (
    FeedForwardConfig,
    KeyIsValueConfig,
    LayerConfig,
    ModelConfig,
    OwnKVConfig,
    PerLayerConfig,
    RopeConfig,
    SharedKVConfig,
)
from equigemma.tokenizers import SentencePieceTokenizer
from equigemma.tokenizers import _sentencepiece_model as spm


VOCAB, WIDTH, HIDDEN, WINDOW = 277, 28, 17, 5


def layer(**options) -> LayerConfig:
    """As in `tiny`, with gates stored as other formats store them."""
    made = tiny.layer(**({"heads": 4, "kv_heads": 2} | options))
    attention = replace(made.attention, qkv_axes="NDH,CKDH")
    return replace(made, attention=attention, ffw=FeedForwardConfig(hidden_dim=HIDDEN))


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

_LOCAL4 = tiny.newer_layer(OwnKVConfig(heads=1), window=WINDOW)
_GLOBAL4 = tiny.newer_layer(OwnKVConfig(heads=1), head_dim=20)
_WIDER = FeedForwardConfig(hidden_dim=2 * HIDDEN)
_SHARED4 = [
    replace(layer, ffw=_WIDER, attention=replace(layer.attention, kv=SharedKVConfig(layer=owner)))
    for owner, layer in enumerate((_LOCAL4, _GLOBAL4))
]
_NEWER = replace(model_config(_LOCAL4), final_norm=_LOCAL4.pre_norm)
_SEEING = replace(
    _LOCAL4,
    ffw=tiny.EXPERTS,
    attention=replace(
        _LOCAL4.attention, kv=OwnKVConfig(heads=3), mask_kind="causal_bidirectional_images"
    ),
)
_TIED = tiny.newer_layer(KeyIsValueConfig(heads=1), head_dim=20, ffw=tiny.EXPERTS)


def gemma3n(layers: int) -> ModelConfig:
    """Of the sizes that llama.cpp has as constants: shared keys begin at layer 20."""
    like = eg.variants.get("gemma3n-e2b")

    def small(layer: LayerConfig) -> LayerConfig:
        window = None if layer.attention.window is None else WINDOW
        attention = replace(layer.attention, heads=4, head_dim=6, window=window)
        return replace(layer, attention=attention, ffw=replace(layer.ffw, hidden_dim=HIDDEN))

    return replace(
        like,
        vocab=VOCAB,
        width=WIDTH,
        layers=tuple(small(layer) for layer in like.layers[:layers]),
        final_softcap=30.0,
        per_layer=replace(like.per_layer, vocab=VOCAB - 2),
    )


NEWER = {
    "gemma3n": gemma3n(25),
    "gemma4 small": replace(
        _NEWER,
        layers=(_LOCAL4, _GLOBAL4, *_SHARED4),
        final_softcap=3.0,
        per_layer=PerLayerConfig(vocab=VOCAB, dim=7),
    ),
    "gemma4 experts": replace(_NEWER, layers=(_SEEING, _TIED), final_softcap=3.0),
}

NEWLINE = 108
_TOWER = replace(tiny.VISION, newline=NEWLINE, start=272, end=273)
SEEING = {
    "3 averaged": tiny.seeing(model_config(_LOCAL3, _GLOBAL3, _LOCAL3), _TOWER),
    # Feed-forwards as wide as the tower, and the square of patches that Gemma 3 averages.
    "4 averaged": tiny.seeing(model_config(_GLOBAL3), replace(_TOWER, pixels=16, hidden=15)),
}
"""With a tower for images, whose tokens are those of `tokenizer(images=True)`."""


def wide(config: ModelConfig) -> ModelConfig:
    """The same with rows that are whole blocks of 32 numbers."""

    def wider(layer: LayerConfig) -> LayerConfig:
        attention = replace(layer.attention, head_dim=16)
        if attention.query_scale != 1.0:
            attention = replace(attention, query_scale=0.25)
        if isinstance(layer.ffw, FeedForwardConfig):
            return replace(layer, attention=attention, ffw=replace(layer.ffw, hidden_dim=96))
        ffw = replace(
            layer.ffw,
            dense=FeedForwardConfig(hidden_dim=96),
            moe=replace(layer.ffw.moe, hidden_dim=32),
        )
        return replace(layer, attention=attention, ffw=ffw)

    return replace(config, width=64, layers=tuple(map(wider, config.layers)))


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


def vocabulary(*, images: bool = False) -> spm.Vocabulary:
    """The vocabulary of `gguf_files`, as SentencePiece has it, and what stands around images."""
    tokens = [token.replace(" ", "▁") for token in files.TOKENS]
    scores, kinds = list(files.SCORES), list(files.TYPES)
    if images:
        # Two line ends are where every Gemma 3 has them.
        tokens = [
            *tokens[:NEWLINE],
            "\n\n",
            *tokens[NEWLINE:],
            "<start_of_image>",
            "<end_of_image>",
        ]
        kinds = [*kinds[:NEWLINE], spm.USER_DEFINED, *kinds[NEWLINE:], spm.CONTROL, spm.CONTROL]
        scores = [-float(index) for index in range(len(tokens))]
    return spm.Vocabulary(tokens, scores, kinds)


def tokenizer(*, images: bool = False, **options) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(vocabulary(images=images), **options)


@eqx.filter_jit(compiler_options=tiny.QUICK)
def logits(model: eg.Transformer, tokens) -> jax.Array:
    return model(tokens).logits


def in_files(name: str) -> eg.ModelConfig:
    """A tiny config that files can express: Gemma 3n has a cap, wider layers are twice as wide."""
    config = tiny.CONFIGS[name]
    if name == "gemma3n":
        cutoff = eg.variants.get("gemma3n-e2b").layers[0].ffw.cutoff
        first, *others = config.layers
        first = replace(first, ffw=replace(first.ffw, cutoff=cutoff))
        stream = replace(config.stream, modes=config.stream.streams)
        return replace(config, final_softcap=30.0, layers=(first, *others), stream=stream)
    if name == "gemma4 small":
        wide = replace(config.layers[2].ffw, hidden_dim=2 * config.layers[0].ffw.hidden_dim)
        layers = (*config.layers[:2], *(replace(layer, ffw=wide) for layer in config.layers[2:]))
        return replace(config, layers=layers)
    return config
