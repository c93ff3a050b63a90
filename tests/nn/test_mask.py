"""Masks against tables written by hand and against plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from equigemma.nn._mask import attention_mask, causal, sliding, valid


def test_causal_by_hand():
    mask = causal(jnp.asarray([2, 3, 4]), jnp.asarray([0, 2, 3, 5]))
    assert mask.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]


def test_valid_by_hand():
    assert valid(jnp.asarray([0, -1, 7])).tolist() == [[True, False, True]]


def test_sliding_by_hand():
    # A query at 10 with a window of 3 sees 8, 9, 10, and as far ahead.
    mask = sliding(jnp.asarray([10]), jnp.asarray([6, 7, 8, 9, 10, 11, 12, 13]), 3)
    assert mask.astype(int).tolist() == [[0, 0, 1, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_without_keys_is_refused(window):
    with pytest.raises(ValueError, match=f"at least one key, got window={window}"):
        sliding(jnp.arange(2), jnp.arange(2), window)


@pytest.mark.parametrize("window", [None, 1, 5, 23])
def test_visible_by_loops(window):
    rng = np.random.default_rng(0)
    q_pos, k_pos = rng.integers(-1, 19, (2, 3, 7)), rng.integers(-1, 19, (2, 3, 11))
    mask = attention_mask(jnp.asarray(q_pos), jnp.asarray(k_pos), window)
    assert mask.shape == (2, 3, 7, 11)
    for index, may_see in np.ndenumerate(np.asarray(mask)):
        *row, query, key = index
        q, k = q_pos[*row, query], k_pos[*row, key]
        assert may_see == (0 <= k <= q and (window is None or q - k < window)), (q, k)
