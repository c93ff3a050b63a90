"""What DeepMind's package computed, through `apply` alone: their config, tree and cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stored import NAMES, Stored, causal, flat, stored


# Upstream's own cached and uncached logits differ by up to 1e-5 on these models, and our program
# sums in yet another order, layer after layer.
CLOSE: dict[str, Any] = dict(rtol=0, atol=5e-5)
SLOTS, PREFILLED, ALL = 16, 6, 11


@pytest.fixture(scope="module", params=NAMES)
def golden(request) -> Stored:
    return stored(request.param)


def apply(golden: Stored, tokens, **options):
    return golden.model.apply(golden.variables, jnp.asarray(tokens), **options)


@pytest.mark.slow
def test_whole_text_with_their_default_positions_and_mask(golden):
    output = apply(golden, golden["tokens"], return_hidden_states=True)
    np.testing.assert_allclose(output.logits, golden["logits"], **CLOSE)
    np.testing.assert_allclose(output.hidden_states, golden["hidden_states"], **CLOSE)
    assert output.cache is None


@pytest.mark.slow
def test_the_last_real_token(golden):
    output = apply(golden, golden["tokens"], return_last_only=True)
    np.testing.assert_allclose(output.logits, golden["last_logits"], **CLOSE)
    assert output.hidden_states is None


@pytest.mark.slow
def test_prefill_and_decode_through_their_cache(golden):
    cache = golden.model.init_cache(batch_size=2, dtype=jnp.float32, cache_length=SLOTS)
    tokens = golden["cached_tokens"]
    positions = jnp.broadcast_to(jnp.arange(ALL, dtype=jnp.int32), (2, ALL))
    output = apply(
        golden,
        tokens[:, :PREFILLED],
        cache=cache,
        positions=positions[:, :PREFILLED],
        attention_mask=causal(PREFILLED, SLOTS),
    )
    np.testing.assert_allclose(output.logits, golden["prefill_logits"], **CLOSE)

    expected = flat(golden.tree("prefill_cache"))
    assert flat(output.cache).keys() == expected.keys()
    for name, value in flat(output.cache).items():
        assert value.dtype == expected[name].dtype, name
        if value.dtype == jnp.int32:
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        else:
            np.testing.assert_allclose(value, expected[name], err_msg=name, **CLOSE)

    for index in range(PREFILLED, ALL):
        output = apply(
            golden,
            tokens[:, index : index + 1],
            cache=output.cache,
            positions=positions[:, index : index + 1],
            attention_mask=causal(1, SLOTS, start=index),
        )
        np.testing.assert_allclose(
            output.logits[:, 0], golden["decode_logits"][:, index - PREFILLED], **CLOSE
        )
    assert output.cache["layer_0"]["end_index"].tolist() == [ALL, ALL]


def test_init_makes_the_stored_tree(golden):
    made = jax.eval_shape(golden.model.init, jax.random.key(0), jnp.asarray(golden["tokens"]))
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in flat(made).items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in flat(golden.variables).items()
    }
