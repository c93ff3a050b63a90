"""Our view of a model and DeepMind's own: trees, parameters, outputs, intermediates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemma import gm

from equigemma import linen


VARIANTS = ["Gemma2_2B", "Gemma2_9B", "Gemma2_27B", "Gemma3_270M", "Gemma3_1B"]
TOKENS = jnp.array([[2, 818, 5279, 529, 7001, 563, 0, 0], [2, 2063, 10779, 78113, 5, 6, 7, 8]])


def shapes(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_init_makes_their_tree(name, dtype):
    theirs, ours = (getattr(package, name)(dtype=dtype) for package in (gm.nn, linen))
    tokens = jnp.ones((2, 3), jnp.int32)
    expected = jax.eval_shape(theirs.init, jax.random.key(0), tokens)
    assert shapes(jax.eval_shape(ours.init, jax.random.key(0), tokens)) == shapes(expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_info_config_and_cache_are_theirs(name):
    theirs, ours = getattr(gm.nn, name)(), getattr(linen, name)()
    assert ours.INFO.tokenizer_version == theirs.INFO.tokenizer_version
    assert ours.config.num_embed == theirs.config.num_embed
    for field in ("support_images", "num_tokens_per_image"):
        assert getattr(ours.config.input_config, field) == getattr(
            theirs.config.input_config, field
        )
    options = {"batch_size": 2, "dtype": jnp.bfloat16, "cache_length": 8}
    expected = jax.eval_shape(lambda: theirs.init_cache(**options))
    assert shapes(jax.eval_shape(lambda: ours.init_cache(**options))) == shapes(expected)


def test_any_upstream_config_makes_a_model():
    theirs = gm.nn.Gemma3_270M()
    ours = linen.Transformer.from_upstream(theirs.config)
    tokens = jnp.ones((1, 3), jnp.int32)
    expected = jax.eval_shape(theirs.init, jax.random.key(0), tokens)
    assert shapes(jax.eval_shape(ours.init, jax.random.key(0), tokens)) == shapes(expected)


def test_same_outputs_from_each_others_parameters(params):
    theirs, ours = gm.nn.Gemma3_270M(dtype=jnp.float32), linen.Gemma3_270M(dtype=jnp.float32)
    expected, output = (
        jax.jit(
            lambda p, model=model: model.apply({"params": p}, TOKENS, return_hidden_states=True)
        )(params)
        for model in (theirs, ours)
    )
    # Float32 through 18 layers; logits are of size 20.
    np.testing.assert_allclose(output.logits, expected.logits, atol=2e-3)
    np.testing.assert_allclose(output.hidden_states, expected.hidden_states, atol=2e-3)
    last = theirs.apply({"params": params}, TOKENS, return_last_only=True).logits
    ours_last = ours.apply({"params": params}, TOKENS, return_last_only=True).logits
    np.testing.assert_allclose(ours_last, last, atol=2e-3)


def test_their_fresh_parameters_run_in_our_model():
    config = gm.nn.Gemma3_270M.config
    small = {"num_embed": 131, "embed_dim": 24, "hidden_dim": 40, "head_dim": 8}
    import dataclasses

    theirs = gm.nn.Transformer(
        config=dataclasses.replace(config, **small), dtype=jnp.float32, tokens="unused"
    )
    ours = linen.Transformer.from_upstream(theirs.config, dtype=jnp.float32)
    tokens = TOKENS % 131
    variables = jax.jit(theirs.init)(jax.random.key(3), tokens)
    np.testing.assert_allclose(
        jax.jit(ours.apply)(variables, tokens).logits,
        jax.jit(theirs.apply)(variables, tokens).logits,
        atol=1e-5,
    )


def test_bfloat16_is_no_further_from_float32_than_theirs(params):
    def logits(package, dtype, params):
        model = package.Gemma3_270M(dtype=dtype)
        return jax.jit(lambda params: model.apply({"params": params}, TOKENS).logits)(params)

    exact = logits(gm.nn, jnp.float32, params)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    errors = [
        float(jnp.sqrt(jnp.mean(jnp.square(found.astype(jnp.float32) - exact))))
        for found in (logits(package, jnp.bfloat16, narrow) for package in (linen, gm.nn))
    ]
    assert errors[0] <= errors[1]
