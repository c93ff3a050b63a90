"""Attention by JAX and by tokamax in place of ours: the same mixtures, and logits."""

import sys
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma._kernels import attention as attention_kernel
from equigemma.nn import DotProductAttention, JaxAttention, TokamaxAttention
from equigemma.nn._dot_product import dot_product, tokamax_dot_product


BY_XLA = partial(dot_product, implementation="xla")


def by_tokamax(*args, **kwargs):
    pytest.importorskip("tokamax", reason='needs pip install "equigemma[tokamax]", Python >= 3.12')
    return tokamax_dot_product(*args, **kwargs)


functions = pytest.mark.parametrize("function", [BY_XLA, by_tokamax], ids=["xla", "tokamax"])


@functions
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_it_mixes_as_ours_does(function, batch, heads, kv_heads):
    length, slots, width = 5, 9, 8
    q = tiny.normal(0, *batch, length, heads, width)
    k, v = (tiny.normal(seed, *batch, kv_heads, slots, width) for seed in (1, 2))
    mask = tiny.normal(3, *batch, length, slots) > 0
    mask = mask.at[..., 0].set(True)
    ours = jax.jit(attention_kernel)(q, k, v, mask)
    theirs = jax.jit(function)(q, k, v, mask)
    # Sums of nine products in float32.
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-6)


def test_soft_caps_of_tokamax():
    q = tiny.normal(0, 5, 4, 8)
    k, v = (tiny.normal(seed, 2, 9, 8) for seed in (1, 2))
    mask = jnp.tril(jnp.ones((5, 9), bool), 4)
    theirs, ours = (
        jax.jit(partial(function, softcap=0.7))(q, k, v, mask)
        for function in (by_tokamax, attention_kernel)
    )
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-6)


@functions
def test_a_query_that_attends_to_nothing_gives_zeros_and_gets_no_gradient(function):
    q = tiny.normal(0, 2, 3, 4, 8)
    k, v = (tiny.normal(seed, 2, 2, 5, 8) for seed in (1, 2))
    mask = jnp.ones((2, 3, 5), bool).at[0, 1].set(False).at[1, :2].set(False)
    empty = np.asarray(~mask.any(axis=-1))

    def loss(function, q, k, v):
        mixed = function(q, k, v, mask)
        return jnp.square(mixed).sum(), mixed

    (_, mixed), (of_q, *of_keys) = jax.jit(
        jax.value_and_grad(partial(loss, function), (0, 1, 2), has_aux=True)
    )(q, k, v)
    assert not np.asarray(mixed)[empty].any()
    assert not np.asarray(of_q)[empty].any()
    # All else is what ours gives, if what such queries give there is left out.
    (_, expected), _ = jax.value_and_grad(partial(loss, attention_kernel), has_aux=True)(q, k, v)
    np.testing.assert_allclose(mixed[~empty], expected[~empty], rtol=0, atol=2e-6)

    def without_empty(*args):
        return jnp.where(empty[..., None, None], jnp.float32(0), attention_kernel(*args))

    _, (expected_q, *expected_keys) = jax.jit(
        jax.value_and_grad(partial(loss, without_empty), (0, 1, 2), has_aux=True)
    )(q, k, v)
    for ours, theirs in zip((of_q, *of_keys), (expected_q, *expected_keys), strict=True):
        # Sums of up to 12 products of numbers up to 10.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_a_model_for_cudnn_is_built_anywhere_and_says_where_it_runs():
    model = tiny.model(tiny.GEMMA3)
    prepared = eg.prepare(model, attention="cudnn")
    assert {one.implementation for one in attends(prepared)} == {"cudnn"}
    try:
        jax.devices("cuda")
    except RuntimeError:
        with pytest.raises(RuntimeError, match="runs on NVIDIA GPUs only, and JAX finds none here"):
            eqx.filter_eval_shape(prepared, tiny.tokens(2, 3))


def test_without_tokamax_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ImportError, match=r'pip install "equigemma\[tokamax\]"'):
        eg.prepare(tiny.model(tiny.GEMMA3), attention="tokamax")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["xla", "tokamax"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3n", "gemma4 small"])
def test_models(name, attention):
    if attention == "tokamax":
        pytest.importorskip("tokamax", reason="needs Python >= 3.12 and the extra `tokamax`")
    model, tokens = tiny.model(tiny.CONFIGS[name]), tiny.tokens(2, 11)
    prepared = eg.prepare(model, attention=attention)
    kinds = {type(one) for one in attends(prepared)}
    # Gemma 2 has a soft cap in every layer.
    of_jax = DotProductAttention if name == "gemma2" else JaxAttention
    assert kinds == {of_jax if attention == "xla" else TokamaxAttention}
    expected = tiny.run(model, tokens).logits
    # Weights of 0.4, logits up to 30, in float32.
    np.testing.assert_allclose(tiny.run(prepared, tokens).logits, expected, rtol=0, atol=2e-4)
    cache = tiny.empty_cache(tiny.CONFIGS[name], (2,), capacity=11)
    output = tiny.run_in_chunks(prepared, tokens, (7, *[1] * 4), cache=cache)
    np.testing.assert_allclose(output.logits, expected, rtol=0, atol=2e-4)


def attends(model) -> list:
    kinds = DotProductAttention | JaxAttention | TokamaxAttention
    parts = jax.tree.flatten(model, is_leaf=lambda part: isinstance(part, kinds))
    return [part for part in parts[0] if isinstance(part, kinds)]


def test_bfloat16_keys_of_a_float32_query():
    q = tiny.normal(0, 3, 4, 8)
    k, v = (tiny.normal(seed, 2, 5, 8).astype(jnp.bfloat16) for seed in (1, 2))
    mask = jnp.tril(jnp.ones((3, 5), bool))
    mixed = dot_product(q, k, v, mask, implementation="xla")
    assert mixed.dtype == q.dtype
    np.testing.assert_allclose(mixed, attention_kernel(q, k, v, mask), rtol=0, atol=2e-6)
