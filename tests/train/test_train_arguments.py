"""Arguments of training as people have them, and what is NaN where no error can be raised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wrong_training import ADAPTED, BATCH, batch, loss, stacked

from equigemma import lora


@pytest.mark.slow
def test_weights_may_be_a_mask_and_all_arrays_of_numpy():
    expected = loss()
    for weights in (BATCH.weights > 0, BATCH.weights.astype(int), BATCH.weights.astype("float16")):
        assert loss(given=batch(weights=weights)) == expected
    names = ("tokens", "targets", "positions", "segments")
    wide = {name: np.asarray(getattr(BATCH, name), np.int64) for name in names}
    assert loss(given=batch(**wide)) == expected


def test_an_adapter_beyond_is_nan_under_jit():
    which = jnp.array([0, 1, -1])
    taken = jax.jit(lora.take)(stacked(), which)
    for found, one in zip(*map(jax.tree.leaves, (taken, lora.split(ADAPTED)[0])), strict=True):
        np.testing.assert_array_equal(found[0], one)
        assert jnp.isnan(found[1:]).all()
