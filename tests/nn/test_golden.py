"""Tiny models of DeepMind's package, run by it in float32: the same numbers at every position."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import upstream


# Upstream's own cached and uncached logits differ by up to 1e-5 on these models, and our program
# sums in yet another order, layer after layer.
CLOSE: dict[str, Any] = dict(rtol=0, atol=5e-5)
NAMES = (
    "gemma2_gqa",
    "gemma2_mha",
    "gemma3",
    "gemma3n",
    "gemma4_k_eq_v",
    "gemma4_moe",
    "gemma4_ple_shared_kv",
)


@pytest.fixture(scope="module", params=NAMES)
def golden(request) -> upstream.Golden:
    return upstream.golden(request.param)


def upstream_inputs(tokens: np.ndarray) -> dict:
    """Upstream counts real tokens for positions, and hides padding by the mask."""
    real = tokens != 0
    positions = np.maximum(np.cumsum(real, axis=-1) - 1, 0).astype(np.int32)
    length = tokens.shape[-1]
    mask = np.tril(np.ones((length, length), bool)) & real[:, None, :]
    return {"positions": jnp.asarray(positions), "mask": jnp.asarray(mask)}


def test_full_pass(golden):
    output = tiny.run(
        golden.model, jnp.asarray(golden["tokens"]), **upstream_inputs(golden["tokens"])
    )
    np.testing.assert_allclose(output.logits, golden["logits"], **CLOSE)
    np.testing.assert_allclose(output.hidden_states, golden["hidden_states"], **CLOSE)


def test_padding_by_positions_instead_of_a_mask(golden):
    tokens = golden["tokens"]
    real = tokens != 0
    positions = np.where(real, np.cumsum(real, axis=-1) - 1, -1).astype(np.int32)
    output = tiny.run(golden.model, jnp.asarray(tokens), positions=jnp.asarray(positions))
    np.testing.assert_allclose(output.logits[real], golden["logits"][real], **CLOSE)
    last = real.sum(axis=-1) - 1
    np.testing.assert_allclose(
        np.asarray(output.logits)[np.arange(2), last], golden["last_logits"], **CLOSE
    )


def test_through_the_cache(golden):
    cache = tiny.empty_cache(golden.model.config, (2,), capacity=16)
    output = tiny.run_in_chunks(
        golden.model, jnp.asarray(golden["cached_tokens"]), (6, 1, 1, 1, 1, 1), cache=cache
    )
    expected = np.concatenate([golden["prefill_logits"], golden["decode_logits"]], axis=1)
    np.testing.assert_allclose(output.logits, expected, **CLOSE)


def test_what_the_cache_remembers(golden):
    # Ours keeps a window of what upstream keeps in full: compare the positions that both have.
    config = golden.model.config
    cache = tiny.empty_cache(config, (2,), capacity=16)
    output = tiny.run(golden.model, jnp.asarray(golden["cached_tokens"][:, :6]), cache=cache)
    assert output.cache.length.tolist() == [6, 6]
    for index, layer in enumerate(output.cache.layers):
        if layer is None:
            # A layer without keys of its own; theirs holds a copy of the owner's.
            assert config.owner(index) < index
            continue
        positions = np.arange(max(0, 6 - layer.capacity), 6)
        for name in ("k", "v"):
            theirs = golden[f"prefill_cache/layer_{index}/{name}"][:, positions]
            ours = np.moveaxis(np.asarray(getattr(layer, name)), 1, 2)
            np.testing.assert_allclose(ours[:, positions % layer.capacity], theirs, **CLOSE)
