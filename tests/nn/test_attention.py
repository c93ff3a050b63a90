"""Grouped-query attention: hand-set values, float64, masks that hide for good."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from equigemma._kernels import _each_head
from equigemma._kernels import attention as attention_kernel
from equigemma.nn import dot_product_attention


L, S, N, H = 5, 7, 6, 10
mix = jax.jit(attention_kernel, static_argnames="softcap")


def qkv(kv_heads: int, *batch: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (*batch, L, N, H), (*batch, kv_heads, S, H), (*batch, kv_heads, S, H)
    q, k, v = (tiny.host(rng.normal(size=shape), dtype) for shape in shapes)
    return q, k, v


def some_mask(*batch: int) -> jax.Array:
    mask = np.random.default_rng(1).random((*batch, L, S)) < 0.6
    mask[..., 0] = True
    return jnp.asarray(mask)


def test_hand_set():
    v = jnp.asarray([[[1.0, 0.0], [0.0, 3.0], [5.0, 5.0]]])
    k = jnp.asarray([[[0.0, 0.0], [np.log(3.0), 0.0], [9.0, 9.0]]])
    q = jnp.asarray([[[1.0, 0.0]], [[1.0, 0.0]]])
    # One key alone; then weights 1 to 3 between two, the third hidden.
    mask = jnp.asarray([[True, False, False], [True, True, False]])
    np.testing.assert_allclose(
        np.asarray(mix(q, k, v, mask))[:, 0], [[1, 0], [0.25, 2.25]], rtol=1e-6
    )
    # A cap of 1 turns log 3 into tanh(log 3), which is 0.8.
    weight = np.exp(0.8) / (1 + np.exp(0.8))
    np.testing.assert_allclose(
        np.asarray(mix(q, k, v, mask, softcap=1.0))[1, 0], [1 - weight, 3 * weight], rtol=1e-6
    )


def test_neighbouring_queries_share_a_key_head():
    # Four query heads over two key heads: 0 and 1 read the first, 2 and 3 the second.
    v = jnp.asarray([[[7.0, 0.0]], [[11.0, 0.0]]])
    mixed = mix(jnp.zeros((1, 4, 2)), jnp.zeros((2, 1, 2)), v, jnp.ones((1, 1), bool))
    assert np.asarray(mixed)[0, :, 0].tolist() == [7, 7, 11, 11]


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("function", [dot_product_attention, attention_kernel])
def test_float64(function, kv_heads, softcap):
    q, k, v = qkv(kv_heads, 2)
    mask = some_mask(2)
    mixed = jax.jit(partial(function, softcap=softcap))(q, k, v, mask)
    for row in range(2):
        heads_last = (np.moveaxis(reference.wide(array)[row], 0, 1) for array in (k, v))
        expected = reference.attend(
            reference.wide(q)[row], *heads_last, np.asarray(mask)[row], softcap
        )
        # Logits up to 10 in float32 carry errors of 1e-6 into the exponential.
        np.testing.assert_allclose(mixed[row], expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_its_logits_in_float32():
    q, k, v = qkv(2, dtype=jnp.bfloat16)
    q = tiny.host(
        8 * reference.wide(q), jnp.bfloat16
    )  # logits of up to 80: in bfloat16 they would be off by a quarter
    mask = some_mask()
    mixed = mix(q, k, v, mask)
    assert mixed.dtype == jnp.bfloat16
    heads_last = (np.moveaxis(reference.wide(array), 0, 1) for array in (k, v))
    expected = reference.attend(reference.wide(q), *heads_last, np.asarray(mask))
    # Weights and result are each rounded once to bfloat16, a relative 2^-8 of values below 3.
    np.testing.assert_allclose(reference.wide(mixed), expected, rtol=2**-7, atol=3 * 2**-8)


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_bfloat16_in_every_shape(kv_heads, batch):
    # The CPU backend lacks some products of bfloat16 with a float32 result, depending on layouts.
    q, k, v = qkv(kv_heads, *batch, dtype=jnp.bfloat16)
    mixed = mix(q, k, v, some_mask(*batch))
    expected = mix(*(tiny.host(array, jnp.float32) for array in (q, k, v)), some_mask(*batch))
    # Weights and result are each rounded to bfloat16, a relative 2^-8 of values below 3.
    np.testing.assert_allclose(reference.wide(mixed), expected, rtol=2**-7, atol=3 * 2**-8)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_heads_in_turn(batch, monkeypatch):
    # Large heads are taken one after the other, where these would go at once.
    arguments = *qkv(3, *batch), some_mask(*batch)

    def grad(*arguments):
        return jax.jit(jax.grad(lambda x: jnp.square(attention_kernel(*x, arguments[3])).sum()))(
            arguments[:3]
        )

    at_once = mix(*arguments), *grad(*arguments)
    monkeypatch.setattr(_each_head, "MANY", 1)
    in_turn = jax.jit(lambda *x: attention_kernel(*x))(*arguments), *grad(*arguments)
    for one, other in zip(in_turn, at_once, strict=True):
        # The same products of float32, grads up to 50.
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def test_hidden_keys_have_no_influence_at_all():
    q, k, v = qkv(3)
    mask = jnp.asarray(np.asarray(some_mask()) & (np.arange(S) != 4))

    def changed(array, key, value):
        array = np.array(array)
        array[:, key] = value
        return jnp.asarray(array)

    before = mix(q, k, v, mask)
    np.testing.assert_array_equal(before, mix(q, changed(k, 4, 1e4), changed(v, 4, -1e4), mask))
    assert not np.array_equal(before, mix(q, k, changed(v, 0, -1e4), mask))


def test_a_query_that_sees_nothing_gives_finite_numbers():
    q, k, v = qkv(3)
    nothing = jnp.zeros((L, S), bool)
    mixed = np.asarray(mix(q, k, v, nothing))
    # Equal weights for all: the mean of the values of its key head.
    np.testing.assert_allclose(mixed[0, 0], np.asarray(v)[0].mean(axis=0), rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda q: attention_kernel(q, k, v, nothing).sum()))(q)
    assert np.isfinite(gradient).all()


def test_logits_too_large_for_the_exponential():
    q, k, v = qkv(3)
    large = tiny.host(1e4 * reference.wide(q), jnp.float32)
    mixed = np.asarray(mix(large, k, v, jnp.ones((L, S), bool)))
    best = np.einsum("h,sh->s", np.asarray(q)[0, 0], np.asarray(k)[0]).argmax()
    np.testing.assert_allclose(mixed[0, 0], np.asarray(v)[0, best], rtol=1e-6)
