"""Tuned lens and Jacobian lens: their formulas in float64, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import equigemma as eg
from equigemma import interpret


MODEL, TOKENS = tiny.model(tiny.GEMMA2), tiny.tokens(3, 6)
SITE = "layers.0.resid_post"


def stream():
    return interpret.activations(lambda m: m(TOKENS), MODEL, [SITE])[1][SITE]


def test_a_new_tuned_lens_is_the_logit_lens():
    lens = interpret.TunedLens(MODEL)
    found = lens(MODEL, stream(), 0)
    np.testing.assert_array_equal(found, interpret.logit_lens(MODEL, stream()))


def test_the_map_and_the_loss_are_their_formulas():
    lens = interpret.TunedLens(MODEL)
    lens = jax.tree.map(lambda leaf: tiny.normal(leaf.ndim, *leaf.shape) / 10, lens)
    x = np.asarray(stream(), np.float64)
    moved = x + x @ np.asarray(lens.weight[0], np.float64).T + np.asarray(lens.bias[0])
    expected = interpret.logit_lens(MODEL, jnp.asarray(moved, jnp.float32))
    np.testing.assert_allclose(lens(MODEL, stream(), 0), expected, rtol=0, atol=1e-5)

    def log_softmax(logits):
        logits = np.asarray(logits, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    p, q = log_softmax(MODEL(TOKENS).logits), log_softmax(expected)
    loss = interpret.tuned_lens_loss(lens, MODEL, TOKENS)
    np.testing.assert_allclose(loss, [(np.exp(p) * (p - q)).sum(-1).mean()], rtol=1e-5)


@pytest.mark.slow
def test_training_brings_the_lens_closer_on_other_texts():
    fresh = tiny.tokens(16, 6, seed=99)
    batches = (tiny.tokens(16, 6, seed=seed) for seed in range(80))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        lens, losses = interpret.fit_tuned_lens(MODEL, batches, optax.adam(1e-2))
    assert losses.shape == (80, 1)
    before = interpret.tuned_lens_loss(interpret.TunedLens(MODEL), MODEL, fresh)
    after = interpret.tuned_lens_loss(lens, MODEL, fresh)
    assert (after < before * 0.6).all()


@pytest.mark.slow
def test_the_jacobian_is_a_finite_difference():
    with jax.enable_x64(True):
        model = jax.tree.map(lambda w: w.astype(jnp.float64), MODEL)
        lens = interpret.fit_jacobian_lens(model, TOKENS, skip=1, batch=5)
        assert lens.jacobian.shape == (1, tiny.WIDTH, tiny.WIDTH)

        def last(m):
            site = "layers.1.resid_post"
            return interpret.activations(lambda m: m(TOKENS), m, [site])[1][site]

        for feature in (0, 7):
            columns = []
            for position in range(1, 5):

                def moved(size, position=position, feature=feature):
                    change = interpret.at(
                        lambda x: x + size, positions=[position], features=[feature]
                    )
                    return interpret.patch(last, model, {SITE: change})

                # Each text by itself; the last token and the first one are no targets.
                difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
                columns.append(difference[:, 1:-1].sum(axis=1).mean(axis=0))
            expected = np.mean(columns, axis=0)
            np.testing.assert_allclose(lens.jacobian[0, :, feature], expected, rtol=0, atol=1e-5)


def test_identities_are_the_logit_lens():
    lens = interpret.JacobianLens(jnp.eye(tiny.WIDTH)[None])
    found = lens(MODEL, stream(), 0)
    np.testing.assert_allclose(found, interpret.logit_lens(MODEL, stream()), rtol=0, atol=1e-6)


WRONG = {
    "streams": (
        lambda: interpret.TunedLens(tiny.model(tiny.GEMMA3N)),
        "This model has parallel streams (AltUp)",
    ),
    "stacked": (
        lambda: interpret.fit_jacobian_lens(
            eg.stack(tiny.model(tiny.model_config(tiny.layer(), tiny.layer()))), TOKENS
        ),
        "are stacked, in one loop, so none has a site of its own: use eg.unstack(model).",
    ),
    "nothing left": (
        lambda: interpret.fit_jacobian_lens(MODEL, TOKENS),
        "Texts of 6 tokens, without the first 16 and the last, have no tokens left",
    ),
    "no batches": (
        lambda: interpret.fit_tuned_lens(MODEL, [], optax.sgd(1.0)),
        "There are no batches to fit the lens to.",
    ),
}


@pytest.mark.parametrize(("call", "says"), WRONG.values(), ids=WRONG)
def test_the_error_says_what_to_do(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)
