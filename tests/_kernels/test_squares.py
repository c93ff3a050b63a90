"""Sums of squares against numpy's in float64, and what they keep in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hlo import as_users_compile

from equigemma._kernels import sum_of_squares


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 1031, 11), (0, 3)])
def test_sums_of_squares(shape, dtype):
    x = tiny.normal(0, *shape, dtype=dtype)
    expected = np.sum(np.square(np.asarray(x, np.float64)))
    # Rounding of up to 22,682 sums in float32, in rows and then of rows.
    np.testing.assert_allclose(sum_of_squares(x), expected, rtol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a fact about XLA on CPU")
def test_squares_are_not_kept():
    x = jax.ShapeDtypeStruct((4096, 128), jnp.float32)
    memory = as_users_compile(jax.jit(sum_of_squares).lower(x)).memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4096 * 128 / 16
