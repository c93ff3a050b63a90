"""Root-mean-square normalisation against hand-set numbers and float64."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from equigemma.config import NormConfig
from equigemma.nn import RMSNorm


def norm_with(scale, config: NormConfig = NormConfig(), dtype=jnp.float32) -> RMSNorm:
    fresh = RMSNorm(len(scale), config, dtype=dtype)
    return eqx.tree_at(lambda norm: norm.scale, fresh, tiny.host(scale, dtype))


def test_hand_set():
    # The mean square of (1, 7) is 25.
    x = jnp.asarray([1.0, 7.0])
    np.testing.assert_allclose(RMSNorm(2, NormConfig())(x), [0.2, 1.4], rtol=1e-6)
    np.testing.assert_allclose(norm_with([1.0, -1.0])(x), [0.4, 0.0], rtol=1e-6)
    np.testing.assert_allclose(
        norm_with([1.0, -1.0], NormConfig(offset=0.0))(x), [0.2, -1.4], rtol=1e-6
    )
    # epsilon is added to the mean square, not to its root: 25 + 11 is 36.
    np.testing.assert_allclose(RMSNorm(2, NormConfig(epsilon=11.0))(x), [1 / 6, 7 / 6], rtol=1e-6)


@pytest.mark.parametrize("offset", [1.0, 0.0, None])
def test_a_fresh_norm_multiplies_by_one(offset):
    fresh = RMSNorm(7, NormConfig(offset=offset))
    x = tiny.normal(0, 3, 7)
    normed = np.asarray(fresh(x))
    np.testing.assert_allclose(np.mean(normed**2, axis=-1), np.ones(3), rtol=1e-5)
    assert (fresh.scale is None) == (offset is None)


def test_float64(shape=(2, 3, 17)):
    rng = np.random.default_rng(1)
    x, scale = rng.normal(size=shape) * 30, rng.normal(size=shape[-1])
    normed = norm_with(scale)(tiny.host(x, jnp.float32))
    expected = np.apply_along_axis(
        reference.norm, -1, reference.wide(np.float32(x)), np.float32(scale), NormConfig()
    )
    # A handful of float32 roundings on numbers below 5.
    np.testing.assert_allclose(normed, expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_rounded_once():
    rng = np.random.default_rng(2)
    x = tiny.normal(3, 5, 127, dtype=jnp.bfloat16)
    norm = norm_with(rng.normal(size=127), dtype=jnp.bfloat16)
    normed = norm(x)
    assert normed.dtype == jnp.bfloat16
    expected = np.apply_along_axis(reference.norm, -1, reference.wide(x), norm.scale, NormConfig())
    # bfloat16 keeps 8 bits, so one rounding is off by at most a relative 2^-8; statistics and a
    # scale in bfloat16 would add roundings of their own.
    np.testing.assert_allclose(reference.wide(normed), expected, rtol=2**-8, atol=0)


def test_squares_that_overflow_float16():
    x = tiny.host(np.full(3, 1000.0), jnp.float16)
    np.testing.assert_array_equal(RMSNorm(3, NormConfig(), dtype=jnp.float16)(x), np.ones(3))


def test_zeros_stay_zeros():
    np.testing.assert_array_equal(RMSNorm(3, NormConfig())(jnp.zeros((2, 3))), np.zeros((2, 3)))
