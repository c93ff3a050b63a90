"""The gate of feed-forward layers against JAX's own gelu, and its derivative against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equigemma._kernels import geglu


HALVES = jnp.asarray(np.random.default_rng(0).normal(0, 3, (5, 3, 2, 7)), jnp.float32)
# Left of zero 1 + tanh is small, and off by 1e-7 however small: times numbers up to 100.
CLOSE = dict(rtol=2e-6, atol=2e-5)
SLOPES = jnp.asarray(np.random.default_rng(1).normal(0, 1, (5, 3, 7)), jnp.float32)


def plain(halves):
    gate, up = jnp.moveaxis(halves, -2, 0)
    return jax.nn.gelu(gate, approximate=True) * up


def grads(function, halves, dtype):
    result, back = jax.vjp(function, halves.astype(dtype))
    return result, back(SLOPES.astype(result.dtype))[0]


def test_value_and_gradients_are_those_of_jax():
    for ours, theirs in zip(
        grads(geglu, HALVES, jnp.float32), grads(plain, HALVES, jnp.float32), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_forward_mode():
    changes = jnp.roll(HALVES, 1, axis=0)
    ours = jax.jvp(geglu, (HALVES,), (changes,))
    theirs = jax.jvp(plain, (HALVES,), (changes,))
    for one, other in zip(ours, theirs, strict=True):
        # Times changes of up to 10.
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=10 * CLOSE["atol"])


def test_of_bfloat16_everything_is_rounded_once():
    short = HALVES.astype(jnp.bfloat16)
    rounded = SLOPES.astype(jnp.bfloat16).astype(jnp.float32)
    result, back = jax.vjp(plain, short.astype(jnp.float32))
    for ours, exact in zip(
        grads(geglu, short, jnp.bfloat16), (result, back(rounded)[0]), strict=True
    ):
        assert ours.dtype == jnp.bfloat16
        # Half of its last bit is up to 2**-8 of a number, and float32 differs before it is rounded.
        np.testing.assert_allclose(
            ours.astype(jnp.float32), exact, rtol=1.01 * 2**-8, atol=CLOSE["atol"]
        )


@pytest.mark.parametrize("gate", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_far_out_it_is_a_line(gate):
    halves = jnp.array([[gate], [2.0]], jnp.float32)
    value, grad = jax.value_and_grad(lambda halves: geglu(halves)[0])(halves)
    line = max(gate, 0.0)
    assert value == 2 * line
    half = 0.5 if gate == 0 else float(gate > 0)
    np.testing.assert_array_equal(grad, [[2 * half], [line]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_alone_and_with_a_derivative(dtype):
    halves = HALVES.astype(dtype)
    value, back = jax.vjp(geglu, halves)
    np.testing.assert_array_equal(value, geglu(halves))
    np.testing.assert_array_equal(jax.vmap(geglu)(halves), value)
    each = jax.vmap(lambda row, grad: jax.vjp(geglu, row)[1](grad)[0])
    np.testing.assert_array_equal(each(halves, jnp.ones_like(value)), back(jnp.ones_like(value))[0])
