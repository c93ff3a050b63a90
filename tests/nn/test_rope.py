"""Rotary embedding against hand-set angles and float64, also far out in a long text."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from hlo import compilations

from equigemma.config import RopeConfig
from equigemma.nn import apply_rope, rope_sin_cos


def turned(x, positions, config: RopeConfig):
    """`x [L N H]` turned to `positions [L]`."""
    return np.asarray(_turned(x, tiny.host(positions, np.int32), config))


@partial(jax.jit, static_argnames="config")
def _turned(x, positions, config):
    return apply_rope(x, *rope_sin_cos(positions, x.shape[-1], config))


def expected(x, positions, config: RopeConfig) -> np.ndarray:
    return np.stack(
        [
            [reference.apply_rope(head, position, config) for head in heads]
            for heads, position in zip(reference.wide(x), positions, strict=True)
        ]
    )


def heads(*shape: int, dtype=jnp.float32) -> jax.Array:
    return tiny.normal(0, *shape, dtype=dtype)


def test_hand_set():
    # One pair turns by its position in radians; position 0 turns nothing.
    x = jnp.asarray([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 2.0]]])
    np.testing.assert_allclose(
        turned(x, [0, 1, 3], RopeConfig())[:, 0],
        [[1.0, 0.0], [np.cos(1), np.sin(1)], [-2 * np.sin(3), 2 * np.cos(3)]],
        rtol=1e-6,
    )


def test_pairs_are_halves_apart_and_slow_down():
    # At theta 100 and head size 4 the two pairs turn by p and p / 10.
    x = jnp.asarray([[[1.0, 1.0, 0.0, 0.0]]])
    result = turned(x, [7], RopeConfig(theta=100.0))[0, 0]
    np.testing.assert_allclose(result, [np.cos(7), np.cos(0.7), np.sin(7), np.sin(0.7)], rtol=1e-5)


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_float64_at_large_positions(theta, scale):
    config = RopeConfig(theta=theta, scale=scale)
    positions = np.array([0, 1, 255, 256, 257, 4_099, 32_771, 131_071])
    x = heads(len(positions), 3, 22)
    error = np.abs(turned(x, positions, config) - expected(x, positions, config))
    # A float32 angle is off by a few roundings of its own size, 2^-24 each: the fastest pair turns
    # by the position itself. The wavelength, the two divisions and the sine round once each.
    bound = 3 * 2**-24 * (positions / scale + 4) * np.abs(x).max()
    assert (error.max(axis=(1, 2)) <= bound).all()


def test_bfloat16_heads_are_turned_by_exact_angles():
    positions = np.array([255, 256, 257, 1_021])
    x = heads(4, 2, 10, dtype=jnp.bfloat16)
    result = turned(x, positions, RopeConfig())
    assert result.dtype == jnp.bfloat16
    # One rounding to bfloat16 of numbers below 4, and the float32 angle of the test above. Angles
    # in bfloat16 could not tell 256 from 257.
    np.testing.assert_allclose(
        reference.wide(result), expected(x, positions, RopeConfig()), rtol=2**-8, atol=1e-3
    )
    same = tiny.host(np.broadcast_to(np.asarray(x)[:1], x.shape), jnp.bfloat16)
    steps = reference.wide(turned(same, positions, RopeConfig()))
    assert abs(steps[1] - steps[2]).max() > 0.1


def test_only_distances_matter():
    q, k = heads(1, 1, 14), heads(2, 1, 14)[1:]
    products = [
        np.vdot(turned(q, [start + 5], RopeConfig()), turned(k, [start], RopeConfig()))
        for start in (0, 11, 1_009)
    ]
    # The products are sums of 14 terms below 10, turned by float32 angles of up to 1014.
    np.testing.assert_allclose(products[1:], products[:1] * 2, atol=2e-3)


def test_scale_stretches_positions():
    x = heads(3, 2, 10)
    stretched = turned(x, [0, 8, 24], RopeConfig(scale=8.0))
    np.testing.assert_array_equal(stretched, turned(x, [0, 1, 3], RopeConfig()))


def test_a_proportion_turns_the_first_pairs_only():
    config = RopeConfig(proportion=0.4)  # 2 of 5 pairs
    x = heads(2, 3, 10)
    result = turned(x, [3, 17], config)
    np.testing.assert_allclose(result, expected(x, [3, 17], config), atol=1e-5)
    np.testing.assert_array_equal(result[..., 2:5], np.asarray(x)[..., 2:5])
    np.testing.assert_array_equal(result[..., 7:], np.asarray(x)[..., 7:])
    assert (result[..., :2] != np.asarray(x)[..., :2]).all()


def test_any_batch():
    x, positions = heads(2, 3, 5, 2, 10), np.arange(30).reshape(2, 3, 5)
    batched = turned(x, positions, RopeConfig())
    alone = turned(jnp.asarray(np.asarray(x)[1, 2]), positions[1, 2], RopeConfig())
    # The compiler may fuse a multiplication and an addition in one shape and not in the other.
    np.testing.assert_allclose(batched[1, 2], alone, atol=1e-6)


def test_outside_jit_compiled_once():
    with compilations() as made:
        rope_sin_cos(jnp.arange(11), 26, RopeConfig())
        first = len(made)
        rope_sin_cos(jnp.arange(11), 26, RopeConfig())
    assert first > 0
    assert len(made) == first
