"""Weights in float16: activations that exceed its range are float32, in every kind of model."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import interpret, quantize, sampling, train


LARGEST = 65_504


FACTORS = {r"post_\w+\.scale|ffw\.down|embedding\.weight": 2e4, "skip_scale": 5}


def large(config: eg.ModelConfig) -> eg.Transformer:
    """Weights that float16 holds and whose residual stream it does not."""

    def scaled(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        factor = next((by for which, by in FACTORS.items() if re.search(which, name)), 1)
        half = (np.asarray(leaf, np.float64) * factor).clip(-LARGEST, LARGEST)
        return tiny.host(half, np.float16)

    return jax.tree_util.tree_map_with_path(scaled, tiny.model(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [(name, "plain") for name in tiny.CONFIGS]
    # What a form does to a product depends on no more than dense layers and experts.
    + [(name, form) for name in ("gemma3", "gemma4 experts") for form in ("prepared", "int8")],
)
def test_the_residual_stream_may_be_larger_than_float16(name, form):
    forms = {"plain": lambda model: model, "prepared": eg.prepare, "int8": quantize.int8}
    model, tokens = large(tiny.CONFIGS[name]), tiny.tokens(2, 7)
    assert model.dtype == jnp.float32
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    half, expected = (tiny.run(forms[form](each), tokens) for each in (model, wide))
    assert half.hidden_states.dtype == jnp.float32
    # The same numbers in the same products; one program or another.
    np.testing.assert_allclose(half.logits, expected.logits, rtol=1e-4, atol=1e-2)
    paths = [f"layers.{index}.pre_attention_norm" for index in range(len(model.layers))]
    _, calls = interpret.capture(lambda model: model(tokens), wide, [*paths, "final_norm"])
    assert max(np.abs(call.args[0]).max() for call in calls) > LARGEST


@pytest.mark.slow
def test_generation_and_training_in_float16():
    model = large(tiny.GEMMA3)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    tokens = tiny.tokens(3)
    ours, expected = (
        sampling.generate(each, tokens, max_new_tokens=5).tokens for each in (model, wide)
    )
    np.testing.assert_array_equal(ours, expected)
    batch = next(train.pack([train.Example(np.arange(3, 9), np.ones(6))], length=7, rows=1))
    for dtype in (None, "float16"):
        loss = jax.jit(lambda model: train.next_token_loss(model, batch, compute_dtype=dtype)[0])
        value, gradient = jax.value_and_grad(loss)(model)
        assert np.isclose(value, loss(wide), rtol=1e-4)
        assert all(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(gradient))
    assert eqx.tree_equal(jax.tree.map(jax.typeof, gradient), jax.tree.map(jax.typeof, model))
