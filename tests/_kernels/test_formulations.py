"""Formulations against the line of `jnp` that each stands for."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
import tiny

from equigemma._kernels import _each_head as heads
from equigemma._kernels import _while_loop as loops
from equigemma._kernels import (
    argmax,
    attention,
    each_head,
    is_finite,
    not_hoisted,
    rematerialized,
    sin_cos,
    smallest_of_best,
    threshold_of,
    update_slot,
    while_loop,
)
from equigemma.nn._attention import dot_product_attention


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


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("many", [1, 1 << 16], ids=["in turn", "at once"])
def test_attention(length, softcap, many, monkeypatch):
    monkeypatch.setattr(heads, "MANY", many)
    q = tiny.normal(0, 2, length, 6, 4)
    k, v = (tiny.normal(seed, 2, 3, 7, 4) for seed in (1, 2))
    mask = tiny.normal(3, 2, length, 7) > 0
    forms = (jit(partial(form, softcap=softcap)) for form in (attention, dot_product_attention))
    ours, expected = (form(q, k, v, mask) for form in forms)
    # Float32: sums of seven numbers of unit size, in another order.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_is_finite():
    for shape in ((), (5,), (17, 3)):
        x = jnp.ones(shape)
        assert jit(is_finite)(x)
        for index in np.ndindex(*shape):
            assert not jit(is_finite)(x.at[index].set(np.inf))


def test_while_loop():
    def masked(state):
        count, total = state
        return jax.lax.cond(count < 37, step, lambda *state: state, count, total)

    def step(count, total):
        return count + 1, total + count

    def run(start):
        return while_loop(lambda s: s[0] < 37, lambda s: step(*s), masked, (start, start))

    def in_runs(start):
        return loops._in_runs(lambda s: s[0] < 37, masked, (start, start))

    for start in (0, 3, 99):
        expected = jax.lax.while_loop(lambda s: s[0] < 37, lambda s: step(*s), (start, start))
        assert jit(run)(start) == jit(in_runs)(start) == expected


def test_rematerialized():
    x = tiny.normal(0, 5)
    policy = jax.checkpoint_policies.nothing_saveable

    def loss(form, x):
        return form(lambda x: jnp.sin(x) * x, x).sum()

    kept = jit(jax.grad(partial(loss, lambda f, x: f(x))))(x)
    again = jit(jax.grad(partial(loss, lambda f, x: rematerialized(policy, jtu.Partial(f), x))))(x)
    np.testing.assert_allclose(again, kept, rtol=0, atol=1e-6)  # float32
