"""JAX's own attention in place of ours: the same mixtures, in a model the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma.nn import Attend, DotProductAttend, attend
from equigemma.nn._dot_product import dot_product


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_it_mixes_as_ours_does(batch, heads, kv_heads):
    length, slots, width = 5, 9, 8
    q = tiny.normal(0, *batch, length, heads, width)
    k, v = (tiny.normal(seed, *batch, kv_heads, slots, width) for seed in (1, 2))
    mask = tiny.normal(3, *batch, length, slots) > 0
    mask = mask.at[..., 0].set(True)
    ours = jax.jit(attend)(q, k, v, mask)
    theirs = jax.jit(dot_product, static_argnames="implementation")(
        q, k, v, mask, implementation="xla"
    )
    # Sums of nine products in float32.
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3n", "gemma4 small"])
def test_models(name):
    model, tokens = tiny.model(tiny.CONFIGS[name]), tiny.tokens(2, 11)
    prepared = eg.prepare(model, attention="xla")
    kinds = {type(one) for one in attends(prepared)}
    # Gemma 2 has a soft cap in every layer.
    assert kinds == ({Attend} if name == "gemma2" else {DotProductAttend})
    expected = tiny.run(model, tokens).logits
    # Weights of 0.4, logits up to 30, in float32.
    np.testing.assert_allclose(tiny.run(prepared, tokens).logits, expected, rtol=0, atol=2e-4)
    cache = tiny.empty_cache(tiny.CONFIGS[name], (2,), capacity=11)
    output = tiny.run_in_chunks(prepared, tokens, (7, *[1] * 4), cache=cache)
    np.testing.assert_allclose(output.logits, expected, rtol=0, atol=2e-4)


def attends(model) -> list:
    kinds = Attend | DotProductAttend
    parts = jax.tree.flatten(model, is_leaf=lambda part: isinstance(part, kinds))
    return [part for part in parts[0] if isinstance(part, kinds)]


def test_bfloat16_keys_of_a_float32_query():
    q = tiny.normal(0, 3, 4, 8)
    k, v = (tiny.normal(seed, 2, 5, 8).astype(jnp.bfloat16) for seed in (1, 2))
    mask = jnp.tril(jnp.ones((3, 5), bool))
    mixed = dot_product(q, k, v, mask, implementation="xla")
    assert mixed.dtype == q.dtype
    np.testing.assert_allclose(mixed, attend(q, k, v, mask), rtol=0, atol=2e-6)
