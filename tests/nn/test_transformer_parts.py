"""Whole models with shared keys, per-layer vectors, parallel streams or experts, in every way."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

import equigemma as eg


# Two float32 programs for the same sums, four layers deep, with logits of up to 10.
CLOSE = dict(rtol=0, atol=3e-5)
LENGTH = 13
NAMES = ("gemma3n", "gemma4 small", "gemma4 experts")


@pytest.fixture(scope="module", params=NAMES)
def model(request) -> eg.Transformer:
    return tiny.model(tiny.CONFIGS[request.param])


@pytest.fixture(scope="module")
def whole(model) -> eg.Output:
    """Two rows in one pass, without a cache."""
    return tiny.run(model, tiny.tokens(2, LENGTH))


# A chunk longer than the window of 5, then steps, over the end of the ring twice.
SIZES = (7, 1, 1, 1, 1, 1, 1)


@pytest.mark.slow
def test_ring_is_none(model, whole):
    cache = tiny.empty_cache(model.config, (2,), capacity=LENGTH)
    output = tiny.run_in_chunks(model, tiny.tokens(2, LENGTH), SIZES, cache=cache)
    np.testing.assert_allclose(output.logits, whole.logits, **CLOSE)
    np.testing.assert_allclose(output.hidden_states, whole.hidden_states, **CLOSE)
    assert jax.tree.structure(output.cache) == jax.tree.structure(cache)


@pytest.mark.slow
def test_ragged_rows_are_as_alone(model, whole):
    lengths = np.array((LENGTH, 6))
    steps = np.arange(LENGTH)
    for first in (np.zeros(2, int), LENGTH - lengths):  # padding after, and before
        positions = steps - first[:, None]
        real = (positions >= 0) & (positions < lengths[:, None])
        tokens = np.asarray(tiny.tokens(2, LENGTH))
        rows = np.take_along_axis(tokens, np.clip(positions, 0, LENGTH - 1), axis=1)
        padded = jnp.asarray(np.where(real, rows, 0))
        positions = tiny.host(np.where(real, positions, -1), np.int32)
        cache = tiny.empty_cache(model.config, (2,), capacity=LENGTH)
        output = tiny.run_in_chunks(model, padded, (7, 6), cache=cache, positions=positions)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(
                np.asarray(output.logits)[row][real[row]],
                np.asarray(whole.logits)[row, :length],
                **CLOSE,
            )
        assert output.cache.length.tolist() == lengths.tolist()


@pytest.mark.slow
def test_any_rank_and_vmapped(model, whole):
    tokens = tiny.tokens(2, LENGTH)
    alone = tiny.run(model, tokens[0])
    np.testing.assert_allclose(alone.logits, np.asarray(whole.logits)[0], **CLOSE)
    mapped = jax.jit(jax.vmap(lambda tokens: model(tokens).logits), compiler_options=tiny.QUICK)
    np.testing.assert_allclose(mapped(tokens), whole.logits, **CLOSE)


@pytest.mark.slow
def test_bfloat16(model):
    narrow = jax.tree.map(lambda leaf: tiny.host(leaf, jnp.bfloat16), model)
    tokens = tiny.tokens(LENGTH)
    output = tiny.run(narrow, tokens)
    assert output.hidden_states.dtype == jnp.bfloat16
    expected, _ = reference.forward(narrow, tokens)
    # Activations are rounded to 8 bits many times a layer. Where that decides between two experts
    # of nearly equal logits a token may differ by much, so the median speaks for the whole.
    error = np.abs(np.asarray(output.logits) - expected)
    assert np.median(error) < 0.03 * np.abs(expected).mean()


@pytest.mark.slow
def test_gradients(model):
    tokens = tiny.tokens(2, 3)
    direction = jax.tree.map(lambda leaf: tiny.normal(leaf.size, *leaf.shape), model)

    def loss(model):
        return jax.nn.logsumexp(model(tokens).logits, axis=-1).mean()

    @partial(jax.jit, compiler_options=tiny.QUICK)
    def both(model):
        return jax.value_and_grad(loss)(model)

    def moved(step):
        shift = np.float32(step)
        return jax.tree.map(
            lambda leaf, d: jnp.asarray(np.asarray(leaf) + shift * np.asarray(d)), model, direction
        )

    _, gradients = both(model)
    grad = sum(
        np.vdot(g, d)
        for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True)
    )
    # Central differences of 4e-4: rounding costs 1e-7 / 4e-4, and further out experts change.
    difference = (both(moved(2e-4))[0] - both(moved(-2e-4))[0]) / 4e-4
    assert grad == pytest.approx(float(difference), rel=2e-2, abs=2e-3)


@pytest.mark.slow
def test_generation_past_the_window(model):
    # Rings of five slots and a text of 3 + 23 tokens; without a cache the model says the same.
    prompt = tiny.tokens(2, 3)
    tokens = eg.sampling.generate(model, prompt, max_new_tokens=23).tokens
    text = np.concatenate([prompt, tokens], axis=1)
    logits = np.asarray(tiny.run(model, jnp.asarray(text)).logits)[:, 2:-1]
    # Where the two best logits are equal up to rounding, either may be chosen.
    chosen = np.take_along_axis(logits, text[:, 3:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, logits.max(axis=-1), **CLOSE)
