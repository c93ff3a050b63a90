"""The table that reads tokens and writes logits."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import reference
import tiny

from equigemma.nn import Embedding


def build(vocab: int, width: int, dtype=jnp.float32) -> Embedding:
    fresh = eqx.filter_jit(lambda key: Embedding(vocab, width, key=key, dtype=jnp.dtype(dtype)))
    return fresh(jax.random.key(0))


def test_hand_set():
    table = jnp.asarray([[1.0, 2.0, 0.0, 0.0], [0.0, 3.0, 0.0, 5.0], [7.0, 0.0, 0.0, 0.0]])
    embedding = eqx.tree_at(lambda e: e.weight, build(3, 4), table)
    # Rows times the root of the width on the way in, inner products on the way out.
    assert embedding.encode(jnp.asarray([1, 0])).tolist() == [[0, 6, 0, 10], [2, 4, 0, 0]]
    assert embedding.decode(jnp.asarray([1.0, 1.0, 9.0, 1.0])).tolist() == [3, 8, 7]


def test_the_factor_is_rounded_as_it_was_in_training():
    # The root of 640 is 25.298 and in bfloat16 25.25; the models were trained with the latter.
    embedding = eqx.tree_at(
        lambda e: e.weight, build(2, 640, jnp.bfloat16), tiny.host(np.ones((2, 640)), jnp.bfloat16)
    )
    assert np.asarray(embedding.encode(jnp.asarray([1])))[0, 0] == 25.25


def test_logits_are_float32_for_bfloat16_weights():
    embedding = build(31, 101, jnp.bfloat16)
    x = tiny.normal(0, 3, 101, dtype=jnp.bfloat16)
    logits = embedding.decode(x)
    assert logits.dtype == jnp.float32
    expected = reference.wide(x) @ reference.wide(embedding.weight).T
    # Products of bfloat16 are exact in float32, and only their sum is rounded.
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_fresh_rows_enter_with_unit_variance():
    vectors = build(503, 211).encode(jnp.arange(503))
    # 503 x 211 normal numbers: their standard deviation is known to half a per cent.
    assert abs(np.std(vectors) - 1) < 0.01
