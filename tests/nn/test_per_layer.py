"""Per-layer embeddings: exact numbers by hand, tokens outside the table, the gate."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from equigemma.config import NormConfig, PerLayerConfig
from equigemma.nn._per_layer import PerLayerEmbedding, PerLayerGate


FLOAT = jnp.dtype(jnp.float32)
CONFIG = PerLayerConfig(vocab=5, dim=4, norm=NormConfig(offset=0.0, epsilon=1e-30))


def embedding() -> PerLayerEmbedding:
    """Three layers; the table holds 100 · token + 10 · layer, the same in all four places."""
    fresh = PerLayerEmbedding(2, 3, CONFIG, key=jax.random.key(0), dtype=FLOAT)
    numbers = 100 * np.arange(5)[:, None] + 10 * np.arange(3)
    table = np.broadcast_to(numbers[..., None], (5, 3, 4))
    return eqx.tree_at(lambda e: e.weight, fresh, tiny.host(table, np.float32))


def test_by_hand():
    module = embedding()
    # What the stream projects to has the signs of its only weight, and norm 1 after the norm.
    weight = np.zeros((2, 3, 4))
    weight[0] = [1, -1, 1, -1]
    module = eqx.tree_at(lambda e: e.projection.weight, module, tiny.host(weight, np.float32))
    x = jnp.asarray([[7.0, 0.0]])
    per_layer_inputs = module(jnp.asarray([3]), x)
    assert per_layer_inputs.shape == (1, 3, 4)
    # Rows of the table times √4; the sum of two parts of unit variance is divided by √2.
    looked_up = 2 * np.array([300, 310, 320])[:, None]
    expected = (looked_up + np.array([1, -1, 1, -1])) / np.sqrt(2)
    np.testing.assert_allclose(per_layer_inputs[0], expected, rtol=1e-6)  # float32


def test_tokens_outside_the_table_count_as_token_0():
    module, x = embedding(), tiny.normal(0, 3, 2)
    outside = module(jnp.asarray([-2, 5, 1_000]), x)
    np.testing.assert_array_equal(outside, module(jnp.asarray([0, 0, 0]), x))
    assert np.abs(np.asarray(outside) - np.asarray(module(jnp.asarray([1, 1, 1]), x))).min() > 100


def test_the_gate_passes_nothing_of_an_empty_vector():
    gate = PerLayerGate(2, CONFIG, key=jax.random.key(0), dtype=FLOAT)
    x, per_layer_input = tiny.normal(0, 3, 2), tiny.normal(1, 3, 4)
    assert not np.asarray(gate(x, jnp.zeros((3, 4)))).any()
    # What comes out is normalised: its size does not depend on that of the vector.
    np.testing.assert_allclose(
        gate(x, 8 * per_layer_input), gate(x, per_layer_input), rtol=1e-5
    )  # float32
    np.testing.assert_allclose(np.square(gate(x, per_layer_input)).mean(axis=-1), 1, rtol=1e-5)
