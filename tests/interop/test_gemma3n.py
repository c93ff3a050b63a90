"""Gemma 3n, tiny: DeepMind's model and ours on the same random parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemma import gm
from gemma.gm.nn.gemma3n import _transformer

from equigemma import linen


# What is left of the published pattern: layers 4 and 5 look at the keys of layers 2 and 3.
LOCAL, GLOBAL = gm.nn.Gemma3n_E2B.config.attention_types[3:5]
CONFIG = dataclasses.replace(
    gm.nn.Gemma3n_E2B.config,
    num_embed=131,
    embed_dim=12,
    hidden_dim=17,
    num_heads=2,
    head_dim=8,
    num_kv_heads=1,
    attention_types=(LOCAL, GLOBAL) * 3,
    sliding_window_size=5,
    activation_sparsity_pattern=(0.95, 0.5, 0.0, 0.0, 0.3, 0.0),
    kv_cache_sharing_config=dataclasses.replace(
        gm.nn.Gemma3n_E2B.config.kv_cache_sharing_config, frac_shared_layers=2 / 6
    ),
    per_layer_input_dim=7,
    laurel_rank=3,
    vision_encoder=None,
)
# The goal of the golden files: float32, sums in another order, logits of size 10.
CLOSE = {"rtol": 0, "atol": 5e-5}
TOKENS = jnp.array([[2, 5, 77, 130, 8, 3, 9, 10, 11, 12, 19], [2, 7, 3, 4, 5, 6, 8, 0, 0, 0, 0]])


@pytest.fixture(scope="module")
def models():
    theirs = _transformer.Gemma3nTransformer(config=CONFIG, dtype=jnp.float32)
    ours = linen.Transformer.from_upstream(CONFIG, dtype=jnp.float32)
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(0)

    def draw(leaf) -> jax.Array:
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32)

    return theirs, ours, jax.tree.map(draw, shapes)


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_trees_are_the_same(models):
    theirs, ours, variables = models
    expected = {name: leaf.shape for name, leaf in flat(variables).items()}
    shapes = jax.eval_shape(ours.init, jax.random.key(0), TOKENS)
    assert {name: leaf.shape for name, leaf in flat(shapes).items()} == expected


def test_logits_and_cache(models):
    theirs, ours, variables = models
    real = np.asarray(TOKENS) != 0
    real = np.asarray(TOKENS) != 0
    outputs = []
    for model in (theirs, ours):

        @jax.jit
        def run(variables, model=model):
            whole = model.apply(variables, TOKENS, return_hidden_states=True)
            cache = model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=TOKENS.shape[1])
            read = model.apply(variables, TOKENS[:1], cache=cache)
            return whole.logits, whole.hidden_states, read.logits, read.cache

        outputs.append(run(variables))
    (expected, hidden, cached, memory), (our_logits, our_hidden, our_cached, ours_kept) = outputs
    assert np.abs(expected[real]).max() > 1
    np.testing.assert_allclose(our_logits[real], expected[real], **CLOSE)
    np.testing.assert_allclose(our_hidden[real], hidden[real], **CLOSE)
    np.testing.assert_allclose(our_cached, cached, **CLOSE)
    assert flat(ours_kept).keys() == flat(memory).keys()
    for name, leaf in flat(memory).items():
        np.testing.assert_allclose(flat(ours_kept)[name], leaf, **CLOSE, err_msg=name)
