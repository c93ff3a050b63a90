"""Tiny models with primes for sizes, so that no axis can pass for another, and ways to run them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import equigemma as eg
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.config import (
    AltUpConfig,
    AttentionConfig,
    DensePlusMoEConfig,
    FeedForwardConfig,
    KeyIsValueConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    OwnKVConfig,
    PerLayerConfig,
    RopeConfig,
    SharedKVConfig,
    SigLIPConfig,
)


VOCAB, WIDTH, HIDDEN, WINDOW = 31, 13, 17, 5


def layer(
    *,
    heads: int = 6,
    kv_heads: int = 3,
    head_dim: int = 10,
    window: int | None = None,
    softcap: float | None = None,
    qk_norm: bool = False,
    post_norm: bool = False,
    rope: RopeConfig = RopeConfig(),
) -> LayerConfig:
    """A layer of the tiny width."""
    return LayerConfig(
        attention=AttentionConfig(
            heads=heads,
            head_dim=head_dim,
            kv=OwnKVConfig(heads=kv_heads),
            rope=rope,
            query_scale=head_dim**-0.5,
            window=window,
            softcap=softcap,
            qk_norm=NormConfig() if qk_norm else None,
            qkv_axes="CNDH" if heads == kv_heads else "NDH,CKDH",
        ),
        ffw=FeedForwardConfig(hidden_dim=HIDDEN, gate_axes="CFD" if post_norm else "CDF"),
        post_norm=NormConfig() if post_norm else None,
    )


def model_config(*layers: LayerConfig, final_softcap: float | None = None) -> ModelConfig:
    """A model of tiny width and vocabulary."""
    return ModelConfig(vocab=VOCAB, width=WIDTH, layers=layers, final_softcap=final_softcap)


GEMMA1_MQA = model_config(layer(heads=3, kv_heads=1), layer(heads=3, kv_heads=1))
GEMMA1_MHA = model_config(layer(heads=3, kv_heads=3), layer(heads=3, kv_heads=3))
GEMMA2 = model_config(
    layer(window=WINDOW, softcap=2.0, post_norm=True),
    layer(softcap=2.0, post_norm=True),
    final_softcap=3.0,
)
GEMMA3 = model_config(
    layer(window=WINDOW, qk_norm=True, post_norm=True),
    layer(qk_norm=True, post_norm=True, rope=RopeConfig(theta=1_000_000.0, scale=8.0)),
)
_NORM = NormConfig(offset=0.0)


def newer_layer(
    kv: OwnKVConfig | KeyIsValueConfig | SharedKVConfig,
    *,
    window: int | None = None,
    ffw: FeedForwardConfig | DensePlusMoEConfig = FeedForwardConfig(hidden_dim=HIDDEN),
    head_dim: int = 6,
    skip_scale: Literal["learned"] | None = "learned",
) -> LayerConfig:
    """A layer with a value norm and scales that are used as they are."""
    proportion = 1.0 if window else 0.4
    return LayerConfig(
        attention=AttentionConfig(
            heads=3,
            head_dim=head_dim,
            kv=kv,
            rope=RopeConfig(theta=100.0, proportion=proportion),
            query_scale=1.0,
            window=window,
            qk_norm=_NORM,
            v_norm=NormConfig(offset=None),
        ),
        ffw=ffw,
        pre_norm=_NORM,
        post_norm=_NORM,
        skip_scale=skip_scale,
    )


GEMMA3N = replace(
    model_config(
        newer_layer(
            OwnKVConfig(heads=1),
            window=WINDOW,
            skip_scale=None,
            ffw=FeedForwardConfig(hidden_dim=HIDDEN, cutoff=0.3),
        ),
        newer_layer(OwnKVConfig(heads=1), skip_scale=None),
        newer_layer(SharedKVConfig(layer=0), window=WINDOW, skip_scale=None),
        newer_layer(SharedKVConfig(layer=1), skip_scale=None),
    ),
    final_norm=_NORM,
    stream=AltUpConfig(streams=3, laurel_rank=2, modes=5, clip=0.5),
    per_layer=PerLayerConfig(vocab=VOCAB - 2, dim=7),
)
GEMMA4_SMALL = replace(
    model_config(
        newer_layer(OwnKVConfig(heads=1), window=WINDOW),
        newer_layer(OwnKVConfig(heads=1), head_dim=10),
        newer_layer(
            SharedKVConfig(layer=0), window=WINDOW, ffw=FeedForwardConfig(hidden_dim=HIDDEN + 2)
        ),
        newer_layer(
            SharedKVConfig(layer=1), head_dim=10, ffw=FeedForwardConfig(hidden_dim=HIDDEN + 2)
        ),
        final_softcap=3.0,
    ),
    final_norm=_NORM,
    per_layer=PerLayerConfig(vocab=VOCAB, dim=7),
)
EXPERTS = DensePlusMoEConfig(
    dense=FeedForwardConfig(hidden_dim=11),
    moe=MoEConfig(num_experts=7, num_experts_per_token=3, hidden_dim=5),
)
GEMMA4_MOE = replace(
    model_config(
        newer_layer(OwnKVConfig(heads=3), window=WINDOW, ffw=EXPERTS),
        newer_layer(KeyIsValueConfig(heads=1), head_dim=10, ffw=EXPERTS),
        final_softcap=3.0,
    ),
    final_norm=_NORM,
)
VISION = SigLIPConfig(
    pixels=12,
    patch=2,
    width=15,
    layers=2,
    heads=5,
    hidden=7,
    num_soft_tokens=4,
    start=29,
    end=30,
    newline=28,
)


def seeing(config: ModelConfig, vision: SigLIPConfig = VISION) -> ModelConfig:
    """The same model with a vision tower."""
    layers = (
        replace(layer, attention=replace(layer.attention, mask_kind="causal_bidirectional_images"))
        for layer in config.layers
    )
    return replace(config, layers=tuple(layers), vision=vision)


GEMMA3_SEEING = seeing(GEMMA3)
CONFIGS = {
    "gemma1 mqa": GEMMA1_MQA,
    "gemma1 mha": GEMMA1_MHA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3n": GEMMA3N,
    "gemma4 small": GEMMA4_SMALL,
    "gemma4 experts": GEMMA4_MOE,
}


# Compiling takes nearly all the time of these tests, and code this small runs fast in any form.
QUICK = {"xla_backend_optimization_level": 0}


@cache
def model(config: ModelConfig, seed: int = 0) -> eg.Transformer:
    """Random weights, also in the norms: a fresh one multiplies by one, as a missing one does."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return host(rng.normal(size=leaf.shape) * 0.4, leaf.dtype)

    return jax.tree.map(draw, skeleton(config))


def host(array, dtype) -> jax.Array:
    """An array cast before it becomes JAX's: a cast by JAX is a program that must be compiled."""
    return jnp.asarray(np.asarray(array).astype(dtype))


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    """Normal random numbers."""
    return host(np.random.default_rng(seed).normal(size=shape), dtype)


def empty_cache(
    config: ModelConfig, batch: tuple[int, ...] = (), *, capacity: int, dtype=jnp.float32
) -> eg.Cache:
    """`init_cache` without compiling anything."""
    shapes = jax.eval_shape(lambda: eg.init_cache(config, batch, capacity=capacity, dtype=dtype))
    return jax.tree.map(lambda leaf: host(np.zeros(leaf.shape), leaf.dtype), shapes)


@eqx.filter_jit(compiler_options=QUICK)
def run(model: eg.Transformer, tokens, **options) -> eg.Output:
    """`model(tokens, ...)`, compiled once for each shape."""
    return model(tokens, **options)


@eqx.filter_jit(compiler_options=QUICK)
def call(model: eg.Transformer, method: str, *arguments, **options):
    """`model.method(...)`, compiled once for each shape."""
    return getattr(model, method)(*arguments, **options)


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    """Random token ids."""
    return host(np.random.default_rng(seed).integers(0, VOCAB, shape), np.int32)


def run_in_chunks(
    model: eg.Transformer, tokens, sizes: Sequence[int], *, cache: eg.Cache, positions=None
) -> eg.Output:
    """Tokens through the cache, a chunk at a time; logits and hidden states are joined."""
    outputs, start = [], 0
    for size in sizes:
        chunk = slice(start, start + size)
        options = {}
        if positions is not None:
            options["positions"] = jnp.asarray(np.asarray(positions)[..., chunk])
        new = jnp.asarray(np.asarray(tokens)[..., chunk])
        outputs.append(run(model, new, cache=cache, **options))
        cache = outputs[-1].cache
        start += size
    assert start == tokens.shape[-1], "the chunks do not add up to the text"
    return eg.Output(
        jnp.asarray(np.concatenate([output.logits for output in outputs], axis=-2)),
        cache,
        jnp.asarray(np.concatenate([output.hidden_states for output in outputs], axis=-2)),
    )
