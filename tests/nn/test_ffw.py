"""The gated feed-forward: hand-set weights, float64, both layouts."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from equigemma.config import FeedForwardConfig
from equigemma.nn import GatedFeedForward


@cache
def build(gate_axes, dtype=jnp.float32, width: int = 13, hidden: int = 17) -> GatedFeedForward:
    config = FeedForwardConfig(hidden_dim=hidden, gate_axes=gate_axes)
    fresh = eqx.filter_jit(
        lambda key: GatedFeedForward(width, config, key=key, dtype=jnp.dtype(dtype))
    )
    return fresh(jax.random.key(0))


run = eqx.filter_jit(lambda ffw, x: ffw(x))


def test_hand_set():
    # gelu of the first, times the second: the tanh form of gelu(2) is 1.9545977, not 1.9544997.
    ffw = eqx.tree_at(
        lambda ffw: (ffw.gate.weight, ffw.down.weight),
        build("CFD", width=1, hidden=1),
        (jnp.asarray([[[2.0]], [[3.0]]]), jnp.asarray([[1.0]])),
    )
    np.testing.assert_allclose(run(ffw, jnp.ones(1)), [1.9545977 * 3], rtol=1e-6)


@pytest.mark.parametrize("gate_axes", ["CFD", "CDF"])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_float64(gate_axes, batch):
    ffw = build(gate_axes)
    x = np.random.default_rng(0).normal(size=(*batch, 13))
    expected = np.apply_along_axis(
        reference.feed_forward, -1, np.float32(x), ffw.gate.weight, ffw.down.weight, gate_axes
    )
    # Two sums of at most 17 products in float32.
    np.testing.assert_allclose(run(ffw, tiny.host(x, jnp.float32)), expected, rtol=1e-5, atol=1e-5)


def test_both_layouts_hold_the_same_numbers():
    first, second = build("CFD"), build("CDF")
    assert first.gate.weight.shape == (2, 17, 13)
    assert second.gate.weight.shape == (2, 13, 17)
    second = eqx.tree_at(
        lambda ffw: (ffw.gate.weight, ffw.down.weight),
        second,
        (jnp.asarray(np.swapaxes(first.gate.weight, 1, 2)), first.down.weight),
    )
    x = tiny.normal(1, 3, 13)
    # The same sums, perhaps in another order.
    np.testing.assert_allclose(run(first, x), run(second, x), rtol=1e-5, atol=1e-6)
