"""Parallel streams: how they start and end, predictions and corrections by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from equigemma.config import AltUpConfig, NormConfig
from equigemma.nn._altup import AltUp, AltUpStream
from equigemma.nn._laurel import Laurel


FLOAT = jnp.dtype(jnp.float32)
CONFIG = AltUpConfig(streams=3, laurel_rank=2, modes=2, clip=0.5)
NORM = NormConfig(offset=0.0)


def root_mean_square(x) -> np.ndarray:
    return np.sqrt(np.square(np.asarray(x, np.float64)).mean(axis=-1))


def test_streams_start_alike_in_size_and_end_as_their_mean():
    stream = AltUpStream(5, CONFIG, key=jax.random.key(0), dtype=FLOAT)
    x = tiny.normal(0, 2, 7, 5) * jnp.asarray([[1.0], [100.0]])[..., None]
    entered = stream.expand(x)
    assert entered.shape == (3, 2, 7, 5)
    np.testing.assert_array_equal(entered[0], x)
    np.testing.assert_allclose(
        root_mean_square(entered), root_mean_square(np.stack([x] * 3)), rtol=1e-5
    )  # float32
    others = np.asarray(entered[1:])
    assert np.abs(others - np.asarray(x)).max() > 1

    # Identities for projections: each stream is stretched to the size of the first, then averaged.
    plain = eqx.tree_at(lambda s: [g.weight for g in s.gather], stream, [jnp.eye(5), jnp.eye(5)])
    streams = jnp.stack([x, 3 * x, jnp.flip(x, axis=-1)])
    expected = (2 * np.asarray(x) + np.asarray(x)[..., ::-1]) / 3
    np.testing.assert_allclose(plain.reduce(streams), expected, rtol=1e-5, atol=1e-5)  # float32


def test_a_token_of_zeros_stays_zeros():
    stream = AltUpStream(5, CONFIG, key=jax.random.key(0), dtype=FLOAT)
    zeros = jnp.zeros((3, 5))
    assert not np.asarray(stream.expand(zeros)).any()
    assert not np.asarray(stream.reduce(stream.expand(zeros))).any()


def alternation(prediction, correction) -> AltUp:
    """A router whose first mode is tanh of the normalised first number, and no second mode."""
    module = AltUp(5, CONFIG, NORM, key=jax.random.key(0), dtype=FLOAT)
    router = np.zeros((5, 2))
    router[0, 0] = 5  # undoes the division by the width
    return eqx.tree_at(
        lambda a: (a.router.weight, a.prediction, a.correction),
        module,
        tuple(tiny.host(array, np.float32) for array in (router, prediction, correction)),
    )


def test_by_hand():
    prediction, correction = np.zeros((2, 3, 3)), np.zeros((2, 3))
    prediction[0, 1, 0] = 0.25  # the second stream gains a quarter of the first, times the mode
    prediction[0, 2, 1] = 7.0  # clipped to a half
    correction[0] = [0.0, -0.25, -7.0]
    module = alternation(prediction, correction)
    first = np.array([np.sqrt(5), 0, 0, 0, 0])  # normalised already
    streams = np.stack([first, np.ones(5), np.arange(5.0)])[:, None]
    mode = np.tanh(np.sqrt(5))

    predicted = module.predict(tiny.host(streams, np.float32))
    expected = streams.copy()
    expected[1] += 0.25 * mode * streams[0]
    expected[2] += 0.5 * mode * streams[1]
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-6)  # float32

    computed = np.array([[2 * np.sqrt(5), 0, 0, 0, 0]])  # the same mode: norms undo the factor
    corrected = module.correct(predicted, tiny.host(computed, np.float32))
    error = computed - streams[0]
    expected[0] += error
    expected[1] += (1 - 0.25 * mode) * error
    expected[2] += (1 - 0.5 * mode) * error
    np.testing.assert_allclose(corrected, expected, rtol=1e-5, atol=1e-5)  # float32


def test_without_coefficients_all_streams_follow_the_first():
    module = alternation(np.zeros((2, 3, 3)), np.zeros((2, 3)))
    streams, computed = tiny.normal(0, 3, 4, 5), tiny.normal(1, 4, 5)
    np.testing.assert_array_equal(module.predict(streams), streams)
    change = np.asarray(module.correct(streams, computed)) - np.asarray(streams)
    expected = np.asarray(computed) - np.asarray(streams)[0]
    np.testing.assert_allclose(change, np.stack([expected] * 3), rtol=1e-5, atol=1e-5)  # float32


def test_bfloat16_streams_keep_their_dtype():
    module = AltUp(5, CONFIG, NORM, key=jax.random.key(0), dtype=jnp.dtype(jnp.bfloat16))
    streams = tiny.normal(0, 3, 4, 5, dtype=jnp.bfloat16)
    assert module.predict(streams).dtype == jnp.bfloat16
    assert module.correct(streams, streams[0]).dtype == jnp.bfloat16


def test_laurel_by_hand():
    module = Laurel(3, 1, NORM, key=jax.random.key(0), dtype=FLOAT)
    left, right = jnp.asarray([[2.0], [0.0], [0.0]]), jnp.asarray([[0.0, 3.0, 0.0]])
    module = eqx.tree_at(lambda m: (m.left.weight, m.right.weight), module, (left, right))
    # The low-rank path leads from the first number to the second, and is normalised.
    result = module(jnp.asarray([5.0, 1.0, 1.0]))
    np.testing.assert_allclose(result, [5.0, 1.0 + np.sqrt(3), 1.0], rtol=1e-6)  # float32
