"""Other things to train and other ways: DeepMind's variables, single rows, privacy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from equigemma import linen, lora, train


MODEL = tiny.model(tiny.GEMMA3)


@pytest.fixture(autouse=True, scope="module")
def promotion():
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        yield


def batch(rows: int = 3) -> train.Batch:
    rng = np.random.default_rng(1)
    texts = [train.Example(rng.integers(0, tiny.VOCAB, 7 + n), np.ones(7 + n)) for n in range(rows)]
    return next(train.pack(texts, length=11, rows=rows))


def losses(step, state, count: int = 4) -> list[float]:
    values = []
    for _ in range(count):
        state, metrics = step(state, batch())
        values.append(float(metrics.loss))
    return values


@pytest.mark.slow
def test_variables_of_the_linen_view_train_as_the_model_does():
    def loss(variables, batch):
        return train.next_token_loss(linen.from_variables(MODEL.config, variables), batch)

    optimizer = optax.adam(1e-2)
    model = jax.tree.map(jnp.copy, MODEL)
    ours = losses(train.make_step(train.next_token_loss, optimizer), train.init(model, optimizer))
    variables = linen.to_variables(jax.tree.map(jnp.copy, MODEL))
    state = train.init(variables, optimizer)
    theirs = losses(train.make_step(loss, optimizer), state)
    assert ours[-1] < ours[0]
    # The same program but for the order of its inputs.
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)


@pytest.mark.slow
def test_adapters_alone_learn_over_frozen_bfloat16_weights():
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MODEL)
    model = lora.add(frozen, rank=3, key=jax.random.key(0))
    optimizer = optax.adam(1e-2)
    state = train.init(model, optimizer, trainable=lora.trainable(model))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.model)} == {"float32"}
    values = losses(train.make_step(train.next_token_loss, optimizer), state, 9)
    assert values[-1] < values[0] - 0.1


@pytest.mark.slow
def test_gradients_of_single_rows_are_those_of_batches_of_one():
    gradients = jax.jit(train.per_example_gradients(train.next_token_loss))
    values, grads = gradients(MODEL, batch())
    assert values.shape == (3,)
    for row in range(3):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch())
        value, grad = gradients(MODEL, alone)
        np.testing.assert_allclose(values[row], value[0], rtol=1e-5)
        for left, right in zip(*map(jax.tree.leaves, (grads, grad)), strict=True):
            # Float32 sums in another order.
            np.testing.assert_allclose(left[row], right[0], atol=1e-5)


def norm(tree) -> float:
    return float(optax.tree.norm(tree))


@pytest.mark.slow
def test_with_privacy_no_row_counts_more_than_the_bound():
    bound = 0.5
    gradients = jax.jit(train.per_example_gradients(train.next_token_loss))

    def private(noise: float, clip: float):
        aggregate = optax.contrib.differentially_private_aggregate(
            l2_norm_clip=clip, noise_multiplier=noise, key=jax.random.key(5)
        )
        update, state = aggregate.update(gradients(MODEL, batch())[1], aggregate.init(MODEL))
        return update, state

    _, grads = gradients(MODEL, batch())
    mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), grads)
    unbounded, _ = private(0.0, 1e6)
    for left, right in zip(*map(jax.tree.leaves, (unbounded, mean)), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)

    rows = [jax.tree.map(lambda leaf, row=row: leaf[row], grads) for row in range(3)]
    assert min(map(norm, rows)) > bound
    bounded, _ = private(0.0, bound)
    expected = jax.tree.map(
        lambda *leaves: sum(leaves),
        *[jax.tree.map(lambda leaf, n=norm(row): leaf * bound / n / 3, row) for row in rows],
    )
    for left, right in zip(*map(jax.tree.leaves, (bounded, expected)), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)

    noisy, state = private(2.0, bound)
    noise = np.concatenate(
        [
            np.ravel(left - right)
            for left, right in zip(*map(jax.tree.leaves, (noisy, bounded)), strict=True)
        ]
    )
    # Of thousands of draws of a standard deviation of noise · bound / rows.
    np.testing.assert_allclose(noise.std(), 2.0 * bound / 3, rtol=0.05)
    again, _ = private(2.0, bound)
    assert eqx.tree_equal(again, noisy)
    assert not np.array_equal(
        jax.random.key_data(state.rng_key), jax.random.key_data(jax.random.key(5))
    )
