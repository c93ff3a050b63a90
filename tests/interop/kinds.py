"""Tiny models of every kind that DeepMind's package has, theirs and ours, on the same parameters.

Sizes are such that no axis can pass for another. Kinds of Gemma 4 are there where their package has
them.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from gemma import gm

from equigemma import linen


LOCAL, GLOBAL = "LOCAL_SLIDING", "GLOBAL"
HAS_GEMMA4 = hasattr(gm.nn, "Gemma4_E2B")
IMAGE = 255_999
"""The token that stands for an image."""
# Compiling takes nearly all the time of tests on tiny models.
QUICK = {"xla_backend_optimization_level": 0}
SMALL = {
    "num_embed": 131,
    "embed_dim": 12,
    "hidden_dim": 17,
    "head_dim": 8,
    "sliding_window_size": 5,
    "vision_encoder": None,
}


class Models(NamedTuple):
    """One model of theirs and ours, and parameters for both."""

    theirs: Any
    ours: linen.Transformer
    variables: dict[str, Any]


def _small(model: Any, heads: int, kv_heads: int, *attention_types: str, **more: Any) -> Any:
    """A model of theirs with a config cut down."""
    # Each generation has an enumeration of its own.
    kinds = {kind.name: kind for kind in model.config.attention_types}
    types = tuple(kinds[name] for name in attention_types or (LOCAL, GLOBAL))
    heads_of = {"num_heads": heads, "num_kv_heads": kv_heads, "attention_types": types}
    config = dataclasses.replace(model.config, **(SMALL | heads_of | more))
    return model.clone(config=config, dtype=jnp.float32, tokens="batch.tokens")


def _gemma2_qkv():
    return _small(gm.nn.Gemma2_2B(), 3, 3)


def _gemma2_gqa():
    return _small(gm.nn.Gemma2_9B(), 4, 2)


def _gemma3():
    return _small(gm.nn.Gemma3_1B(), 4, 1)


def encoder() -> Any:
    """Their SigLIP, tiny."""
    full = gm.nn.Gemma3_4B.config.vision_encoder
    return full.clone(
        siglip_encoder=full.siglip_encoder.clone(
            patch_size=(2, 2), width=15, depth=2, mlp_dim=17, num_heads=5
        ),
        siglip_exit=full.siglip_exit.clone(output_length=4),
        num_mm_tokens_per_image_prepool=36,
        num_mm_tokens_per_image=4,
        image_height=12,
        image_width=12,
    )


def _gemma3_vision():
    # Ids reach up to that of the end of an image.
    return _small(gm.nn.Gemma3_4B(), 4, 2, num_embed=256_007, vision_encoder=encoder())


def _gemma3n():
    config = gm.nn.Gemma3n_E2B.config
    sharing = dataclasses.replace(config.kv_cache_sharing_config, frac_shared_layers=2 / 6)
    return _small(
        gm.nn.Gemma3n_E2B(),
        4,
        2,
        *(LOCAL, GLOBAL) * 3,
        # What is left of the published pattern: layers 4 and 5 attend to the keys of 2 and 3.
        kv_cache_sharing_config=sharing,
        activation_sparsity_pattern=(0.95, 0.5, 0.0, 0.0, 0.3, 0.0),
        per_layer_input_dim=7,
        laurel_rank=3,
    )


def _gemma4(full: Any, heads: int, kv_heads: int, *types: str, **more: Any) -> Any:
    return _small(
        full, heads, kv_heads, *types, **({"global_key_size": 10, "audio_encoder": None} | more)
    )


def _gemma4_sharing():
    full = gm.nn.Gemma4_E2B()
    sharing = dataclasses.replace(full.config.kv_cache_sharing_config, frac_shared_layers=0.5)
    return _gemma4(
        full,
        2,
        1,
        *(LOCAL, GLOBAL) * 2,
        kv_cache_sharing_config=sharing,
        per_layer_input_dim=7,
        override_kv_shared_ffw_hidden=19,
    )


def _gemma4_key_is_value():
    full = gm.nn.Gemma4_31B()
    return _gemma4(full, 4, 2, num_global_kv_heads=1)


def _gemma4_experts():
    return _gemma4(
        gm.nn.Gemma4_26B_A4B(),
        4,
        2,
        num_global_kv_heads=1,
        num_experts=5,
        top_k_experts=2,
        expert_dim=6,
        moe_dense_hidden_dim=11,
    )


KINDS: dict[str, Callable[[], Any]] = {
    "gemma2 qkv": _gemma2_qkv,
    "gemma2 gqa": _gemma2_gqa,
    "gemma3": _gemma3,
    "gemma3 vision": _gemma3_vision,
    "gemma3n": _gemma3n,
}
if HAS_GEMMA4:
    KINDS |= {
        "gemma4 sharing": _gemma4_sharing,
        "gemma4 key is value": _gemma4_key_is_value,
        "gemma4 experts": _gemma4_experts,
    }


def models(kind: str, dtype: Any = jnp.float32, scale: float = 0.3) -> Models:
    """The models of one kind, on normal random parameters: also of norms, which start as ones."""
    theirs = KINDS[kind]().clone(dtype=dtype)
    # Samplers go by the generation that the class of a model names.
    ours = getattr(linen, type(theirs).__name__).from_upstream(
        theirs.config,
        text_only=theirs.config.vision_encoder is None,
        dtype=dtype,
        tokens=theirs.tokens,
    )
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), tokens())
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype)  # noqa: E731
    return Models(theirs, ours, jax.tree.map(draw, shapes))


def tokens() -> jax.Array:
    """Two rows; the second is padded with 0."""
    return jnp.array([[2, 5, 77, 130, 8, 3, 9, 10, 11, 12, 19], [2, 7, 3, 4, 5, 6, 8, 0, 0, 0, 0]])


def flat(tree: Any) -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a/b": 1}`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@contextlib.contextmanager
def mended_router() -> Iterator[None]:
    """Their mixture of experts as it is from the day after 4.0.1 on.

    In 4.0.1 the router gets its input from the norm that is for the experts, and normalises it once
    more. Here, it gets what that norm gets.
    """
    entered: dict[tuple[str, ...], Any] = {}

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            *block, name = context.module.path or [None]
            if name == "pre_ffw_norm":
                entered[tuple(block)] = args[0]
            if name == "router_norm":
                args = (entered[tuple(block[:-1])],)
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield
