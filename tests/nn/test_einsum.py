"""The one place where a weight meets an activation: values, dtypes, accumulation."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from equigemma._kernels import contract, result_axes, weight_axes
from equigemma.nn import Einsum


@cache
def build(eqn: str, shape: tuple[int, ...]) -> Einsum:
    fresh = eqx.filter_jit(lambda key: Einsum(eqn, shape, key=key, dtype=jnp.dtype(jnp.float32)))
    return fresh(jax.random.key(0))


def test_axes_of_an_equation():
    assert weight_axes("...D,CKDH->...CKH") == "CKDH"
    assert result_axes("...D,CKDH->...CKH") == "CKH"


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize(
    ("eqn", "x_shape", "shape"),
    [
        ("...D,NDH->...NH", (13,), (3, 13, 7)),
        ("...NH,NHD->...D", (3, 7), (3, 7, 13)),
        ("...D,CFD->...CF", (13,), (2, 11, 13)),
        ("...D,FDC->...CF", (13,), (11, 13, 2)),  # outputs in another order than the weight's
    ],
)
def test_float64(eqn, x_shape, shape, batch):
    x = tiny.normal(0, *batch, *x_shape)
    einsum = build(eqn, shape)
    expected = np.einsum(eqn, reference.wide(x), reference.wide(einsum.weight))
    # Sums of 21 products of unit size, in float32.
    np.testing.assert_allclose(jax.jit(einsum.__call__)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("weight_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_is_accumulated_wide_and_rounded_once(rows, weight_dtype):
    x = tiny.normal(1, rows, 4099, dtype=jnp.bfloat16)
    weight = tiny.normal(2, 5, 4099, dtype=jnp.bfloat16)
    product = jax.jit(contract, static_argnums=0)(
        "...D,FD->...F", x, tiny.host(weight, weight_dtype)
    )
    assert product.dtype == jnp.bfloat16
    expected = np.einsum("rd,fd->rf", reference.wide(x), reference.wide(weight))
    # One rounding to bfloat16, and float32 sums of 4099 products of unit size. Sums kept in
    # bfloat16 would be off by ten per cent.
    np.testing.assert_allclose(reference.wide(product), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_float32_result_of_bfloat16_is_not_rounded_in_between(rows):
    x = tiny.normal(3, rows, 127, dtype=jnp.bfloat16)
    weight = tiny.normal(4, 31, 127, dtype=jnp.bfloat16)
    product = jax.jit(contract, static_argnums=(0, 3))("...D,VD->...V", x, weight, jnp.float32)
    assert product.dtype == jnp.float32
    expected = np.einsum("rd,vd->rv", reference.wide(x), reference.wide(weight))
    # Products of bfloat16 are exact in float32, their sums round in float32.
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-4)


def test_fresh_weights_keep_the_size_of_activations():
    einsum = build("...NH,NHD->...D", (4, 101, 307))
    result = jax.jit(einsum.__call__)(tiny.normal(5, 211, 4, 101))
    # 211 x 307 results of variance one around a weight drawn once: within two per cent.
    assert abs(np.std(result) - 1) < 0.02


def test_an_axis_of_the_wrong_size_is_refused():
    einsum = build("...D,FD->...F", (5, 7))
    with pytest.raises(ValueError, match="Size of label 'D'"):
        einsum(jnp.zeros(11))


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize(
    ("eqn", "inputs", "shape"),
    [
        ("...D,CFD->...CF", (7,), (2, 5, 7)),
        ("...F,FD->...D", (5,), (5, 7)),
        ("...D,NDH->...NH", (7,), (2, 7, 3)),
        ("...NH,NHD->...D", (2, 3), (2, 3, 7)),
    ],
)
def test_gradients_of_bfloat16(eqn, inputs, shape, rows):
    rng = np.random.default_rng(0)
    # Of small whole numbers nothing is ever rounded.
    x, weight = (rng.integers(-4, 5, size) for size in ((rows, *inputs), shape))

    def grads(function, dtype):
        def total(x, weight):
            return jnp.square(function(x, weight).astype(jnp.float32)).sum() / 2

        operands = (jnp.asarray(each, dtype) for each in (x, weight))
        return jax.jit(jax.grad(total, (0, 1)))(*operands)

    narrow = grads(lambda x, w: contract(eqn, x, w), jnp.bfloat16)
    wide = grads(lambda x, w: jnp.einsum(eqn, x, w), jnp.float32)
    for one, other in zip(narrow, wide, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(one.dtype))
