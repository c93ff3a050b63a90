"""Preference tuning against its formula in float64, and as steps that learn."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from equigemma import train


MODEL = tiny.model(tiny.GEMMA2)
LENGTH = 11


@pytest.fixture(autouse=True, scope="module")
def promotion():
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        yield


def example(rng, given: int, size: int) -> train.Example:
    return train.Example(rng.integers(0, tiny.VOCAB, size), np.arange(size) >= given)


def pairs(count: int = 3, rows: int = 3) -> train.PreferenceBatch:
    """Answers of different lengths, and a reference that prefers some."""
    rng = np.random.default_rng(4)
    both = [(example(rng, 2, 5 + n), example(rng, 2, 11 - n)) for n in range(count)]
    (batch,) = train.collate_pairs(both, length=LENGTH, rows=rows)
    reference = tiny.normal(3, rows, 2) - 30
    return eqx.tree_at(lambda p: p.reference_logprobs, batch, reference)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(model, pairs, beta, length_normalized, smoothing) -> float:
    """Equation 7 of the paper, row by row in float64, from all logits."""
    total = 0.0
    for row in range(len(pairs.reference_logprobs)):
        gains = []
        for side, batch in enumerate((pairs.chosen, pairs.rejected)):
            size = int((batch.segments[row] >= 0).sum())
            logits = np.asarray(tiny.run(model, batch.tokens).logits, np.float64)[row, :size]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            weights = np.asarray(batch.weights[row, :size], np.float64)
            chosen = log_p[np.arange(size), np.asarray(batch.targets[row, :size])]
            gain = (chosen * weights).sum() - float(pairs.reference_logprobs[row, side])
            gains.append(gain / weights.sum() if length_normalized else gain)
        margin = beta * (gains[0] - gains[1])
        total -= (1 - smoothing) * np.log(sigmoid(margin)) + smoothing * np.log(sigmoid(-margin))
    return total


OPTIONS = [(0.1, False, 0.0), (0.3, False, 0.2), (0.7, True, 0.0), (2.0, True, 0.1)]


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "length_normalized", "smoothing"), OPTIONS)
def test_the_loss_is_that_of_the_formula(beta, length_normalized, smoothing):
    options = dict(beta=beta, length_normalized=length_normalized, label_smoothing=smoothing)

    @jax.jit
    def loss(model, pairs):
        return train.dpo_loss(model, pairs, **options, chunk=5)

    total, count = loss(MODEL, pairs())
    assert count == 3
    # Log-probabilities of about 50 are sums of float32.
    np.testing.assert_allclose(total, by_hand(MODEL, pairs(), *options.values()), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "length_normalized", "smoothing"), OPTIONS[1::2])
def test_its_gradient_is_that_of_the_formula_without_chunks(beta, length_normalized, smoothing):
    options = dict(beta=beta, length_normalized=length_normalized, label_smoothing=smoothing)
    batch = pairs()

    def plain(model):
        gains = []
        for side, rows in enumerate((batch.chosen, batch.rejected)):
            logits = model(rows.tokens, positions=rows.positions, mask=rows.mask()).logits
            log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.targets[..., None], -1)
            gain = (log_p[..., 0] * rows.weights).sum(-1) - batch.reference_logprobs[:, side]
            gains.append(gain / rows.weights.sum(-1) if length_normalized else gain)
        margin = beta * (gains[0] - gains[1])
        right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
        return -jnp.sum((1 - smoothing) * right + smoothing * wrong)

    def ours(model):
        return train.dpo_loss(model, batch, **options, chunk=5)[0]

    expected, grads = (jax.jit(jax.grad(loss))(MODEL) for loss in (plain, ours))
    size = float(optax.tree.norm(expected))
    assert size > 0.01
    for left, right in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        # Float32 sums in another order, as shares of the whole gradient.
        np.testing.assert_allclose(left, right, atol=1e-5 * size)


def test_against_itself_a_model_has_no_margin_and_empty_rows_do_not_count():
    batch = jax.jit(train.with_reference_logprobs)(MODEL, pairs(2, 3))
    margins = jax.jit(train.reward_margins)(MODEL, batch)
    # Twice the same program up to its fusions; sums are about 50.
    np.testing.assert_allclose(margins, 0, atol=1e-4)
    total, count = jax.jit(train.dpo_loss)(MODEL, batch)
    assert count == 2
    np.testing.assert_allclose(total, 2 * np.log(2), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length_normalized", [False, True])
def test_steps_learn_to_prefer(length_normalized):
    def loss(model, pairs):
        return train.dpo_loss(
            model,
            pairs,
            beta=2.0 if length_normalized else 0.5,
            length_normalized=length_normalized,
        )

    optimizer = optax.adam(1e-2)
    batch = jax.jit(train.with_reference_logprobs)(MODEL, pairs(4, 4))
    ends = []
    # Micro-batches do not see what the loss is.
    for parts in (1,) if length_normalized else (1, 2):
        state = train.init(jax.tree.map(jnp.copy, MODEL), optimizer)
        step = train.make_step(loss, optimizer, micro_batches=parts)
        losses = []
        for _ in range(7):
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))
        np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-4)
        assert losses[-1] < 0.3
        assert (jax.jit(train.reward_margins)(train.merge(state), batch) > 1).all()
        ends.append(losses[1])
    # The same sums in another order, one step later.
    np.testing.assert_allclose(ends[0], ends[-1], rtol=1e-3)


def test_an_answer_that_does_not_fit_is_named():
    rng = np.random.default_rng(0)
    both = [(example(rng, 1, 5), example(rng, 1, 6)), (example(rng, 1, 5), example(rng, 1, 12))]
    with pytest.raises(ValueError, match="Pair 1 has an answer that ends after 12 tokens; rows"):
        list(train.collate_pairs(both, length=LENGTH, rows=3))
