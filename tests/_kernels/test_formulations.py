"""Formulations against the line of `jnp` that each stands for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma._kernels import _each_head as heads
from equigemma._kernels import (
    argmax,
    each_head,
    not_hoisted,
    sin_cos,
    smallest_of_best,
    threshold_of,
    update_slot,
)


jit = partial(jax.jit, compiler_options=tiny.QUICK)


def test_argmax():
    x = tiny.normal(0, 2, 3, 101)
    np.testing.assert_array_equal(jit(argmax)(x), jnp.argmax(x, axis=-1))
    equal = jnp.zeros((3, 7)).at[:, 2].set(1).at[:, 5].set(1)
    np.testing.assert_array_equal(jit(argmax)(equal), [2, 2, 2])
    none = jnp.asarray([[0, np.nan, 2], [-np.inf] * 3])
    np.testing.assert_array_equal(jit(argmax)(none), [-1, -1])


@pytest.mark.parametrize("shape", [(1, 4), (5, 4), (2, 3, 9), (3, 7)])
def test_sin_cos(shape):
    angles = 1000 * tiny.normal(0, *shape)
    sin, cos = jit(sin_cos)(angles)
    # Float32; two programs may round a sine differently.
    np.testing.assert_allclose(sin, jnp.sin(angles), rtol=0, atol=2**-22)
    np.testing.assert_allclose(cos, jnp.cos(angles), rtol=0, atol=2**-22)


def test_smallest_of_best():
    scores = tiny.normal(0, 3, 101)
    for count in (1, 5, 101):
        expected = np.sort(scores)[..., -count, None]
        np.testing.assert_array_equal(
            jit(smallest_of_best, static_argnums=1)(scores, count), expected
        )


def test_threshold():
    scores = tiny.normal(0, 3, 101)
    probs = np.asarray(jax.nn.softmax(scores))
    found = jit(threshold_of)(scores, probs, jnp.float32(0.7))
    for row, prob, one in zip(np.asarray(scores), probs, found, strict=True):
        assert one[0] == max(s for s in row if prob[row >= s].sum() >= 0.7)


@pytest.mark.parametrize("many", [1, 1 << 16], ids=["in turn", "at once"])
def test_each_head(many, monkeypatch):
    monkeypatch.setattr(heads, "MANY", many)

    def mix(rows, k, v, mask):
        return jnp.where(mask, rows @ k.T, 0) @ v

    q, k, v = (tiny.normal(seed, 2, 3, size, 4) for seed, size in enumerate((5, 7, 7)))
    mask = tiny.normal(9, 2, 5, 7) > 0
    expected = jax.vmap(jax.vmap(mix, (0, 0, 0, None)))(q, k, v, mask)
    # Sums of seven products of unit size, in another order.
    np.testing.assert_allclose(jit(partial(each_head, mix))(q, k, v, mask), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("slot", [0, 3, 6])
@pytest.mark.parametrize("real", [True, False])
def test_update_slot(dtype, slot, real):
    slots = tiny.normal(0, 3, 7, 2).astype(dtype)
    new = (9 * tiny.normal(1, 3, 1, 2)).astype(dtype)
    expected = jnp.where(real, slots.at[:, slot].set(new[:, 0]), slots)
    updated = jit(partial(update_slot, axis=1))(slots, new, jnp.asarray(slot), real=real)
    np.testing.assert_array_equal(updated, expected)


def test_not_hoisted_changes_nothing():
    tree, step = {"w": tiny.normal(0, 3)}, jnp.asarray(2)
    value, until = jit(lambda tree, step: not_hoisted(tree, until=step))(tree, step)
    np.testing.assert_array_equal(value["w"], tree["w"])
    assert until == 2
