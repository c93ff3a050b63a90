"""The index of the largest number of a row, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma._kernels import argmax


jitted = jax.jit(argmax, compiler_options=tiny.QUICK)


@pytest.mark.parametrize("shape", [(4096,), (3, 1040), (2, 2, 1009), (5, 16)])
def test_the_first_of_equals(shape):
    # So few values that every row has its largest many times.
    x = np.random.default_rng(0).integers(-40, 40, shape).astype(np.float32)
    top = x.max(axis=-1, keepdims=True)
    for numbers in (x, np.where(x == top, np.inf, x), np.where(x < top, -np.inf, x)):
        np.testing.assert_array_equal(jitted(numbers), np.argmax(numbers, axis=-1))


def test_the_last_and_the_only():
    x = np.zeros((2, 2048), np.float32)
    x[0, -1] = x[1, 511] = 1
    np.testing.assert_array_equal(jitted(x), [2047, 511])
    np.testing.assert_array_equal(jitted(x[:, :1]), [0, 0])


@pytest.mark.parametrize("size", [1024, 1009])
def test_rows_without_a_largest(size):
    x = np.zeros((3, size), np.float32)
    x[0, 700], x[1] = np.nan, -np.inf
    np.testing.assert_array_equal(jitted(x), [-1, -1, 0])


def test_under_vmap():
    x = tiny.normal(0, 3, 2, 1024, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(jax.vmap(argmax)(x), np.argmax(np.asarray(x), axis=-1))
