"""Masks that are given to a call with a cache: the same as without one, whatever the cache is."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import tiny


PREFIX, LENGTH = 4, 11
CAPACITIES = {"exact": LENGTH, "longer": 17}
CONFIGS = {
    "full": tiny.GEMMA1_MQA,
    "ring and full": tiny.GEMMA3,
    "shared": tiny.GEMMA3N,
    "shared, per layer": tiny.GEMMA4_SMALL,
    "short window": tiny.model_config(tiny.layer(window=3), tiny.layer(), tiny.layer(window=2)),
    "rings alone": tiny.model_config(tiny.layer(window=5), tiny.layer(window=3)),
}
# Float32 sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def prefix_lm(lengths: np.ndarray) -> np.ndarray:
    """`[B L L]`: tokens of the prefix attend to all of it; every row ablates a key of its own."""
    steps = np.arange(LENGTH)
    mask = steps[None, :, None] >= steps[None, None, :]
    mask = mask | (steps[None, None, :] < PREFIX) & (steps[None, :, None] < PREFIX)
    mask = np.repeat(mask, len(lengths), axis=0)
    for row in range(len(lengths)):
        # From some token on, two keys are not there: one near, so that no window hides it.
        mask[row, 6:, 5 - row % 2] = False
        mask[row, PREFIX:, 2 + row % 2] = False
    return mask


@cache
def whole(name: str) -> np.ndarray:
    model, tokens = tiny.model(CONFIGS[name]), tiny.tokens(2, LENGTH)
    return np.asarray(tiny.run(model, tokens, mask=jnp.asarray(prefix_lm(np.zeros(2)))).logits)


def columns(mask: np.ndarray, capacity: int) -> jnp.ndarray:
    """A mask with a column for every position; those to come say True, as if someone forgot."""
    more = ((0, 0), (0, 0), (0, capacity - LENGTH))
    return jnp.asarray(np.pad(mask, more, constant_values=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("sizes", [(LENGTH,), (4, 1, 1, 1, 1, 1, 1, 1), (4, 3, 4)])
def test_a_mask_with_a_cache_is_that_without_one(name, capacity, sizes):
    model, tokens, expected = tiny.model(CONFIGS[name]), tiny.tokens(2, LENGTH), whole(name)
    mask = columns(prefix_lm(np.zeros(2)), CAPACITIES[capacity])
    state = tiny.empty_cache(model.config, (2,), capacity=CAPACITIES[capacity])
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        output = tiny.run(model, tokens[:, part], mask=mask[:, part], cache=state)
        np.testing.assert_allclose(output.logits, expected[:, part], **CLOSE)
        state, start = output.cache, start + size


@pytest.mark.slow
def test_the_masks_of_these_tests_make_a_difference():
    for name, expected in ((name, whole(name)) for name in CONFIGS):
        plain = np.asarray(tiny.run(tiny.model(CONFIGS[name]), tiny.tokens(2, LENGTH)).logits)
        changed = np.abs(plain - expected).max(axis=-1)
        assert (changed[:, [0, *range(6, 8)]] > 1e-2).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ring and full", "shared", "rings alone"])
@pytest.mark.parametrize("before", [True, False])
def test_ragged_rows(name, before):
    model, tokens, expected = (
        tiny.model(CONFIGS[name]),
        np.array(tiny.tokens(2, LENGTH)),
        whole(name),
    )
    lengths, capacity = np.array([7, 5]), 17
    mask = np.asarray(columns(prefix_lm(lengths), capacity))
    # Of each row its first tokens, with padding before or after; their rows of the mask with them.
    place = np.arange(7) - (7 - lengths[:, None] if before else 0)
    is_token = (place >= 0) & (place < lengths[:, None])
    index = np.where(is_token, place, 0)
    rows = np.arange(2)[:, None]
    output = tiny.run(
        model,
        jnp.asarray(tokens[rows, index]),
        positions=jnp.asarray(np.where(is_token, place, -1)),
        mask=jnp.asarray(mask[rows, index]),
        cache=tiny.empty_cache(model.config, (2,), capacity=capacity),
    )
    logits = np.asarray(output.logits)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, is_token[row]], expected[row, :length], **CLOSE)
    for step in range(4):
        at = lengths + step
        output = tiny.run(
            model,
            jnp.asarray(tokens[[0, 1], at][:, None]),
            mask=jnp.asarray(mask[[0, 1], at][:, None]),
            cache=output.cache,
        )
        np.testing.assert_allclose(np.asarray(output.logits)[:, 0], expected[[0, 1], at], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ring and full", "shared, per layer"])
def test_a_cache_in_8_bits(name):
    model, tokens = tiny.model(CONFIGS[name]), tiny.tokens(2, LENGTH)
    mask = columns(prefix_lm(np.zeros(2)), 17)

    def logits(sizes, mask):
        state = tiny.empty_cache(model.config, (2,), capacity=17, dtype=jnp.int8)
        start, parts = 0, []
        for size in sizes:
            part = slice(start, start + size)
            output = tiny.run(model, tokens[:, part], mask=mask[:, part], cache=state)
            state, start = output.cache, start + size
            parts.append(np.asarray(output.logits))
        return np.concatenate(parts, axis=1)

    at_once, stepwise = logits((LENGTH,), mask), logits((4, 3, 1, 1, 1, 1), mask)
    # Each key is rounded once, whatever the chunks.
    np.testing.assert_allclose(stepwise, at_once, **CLOSE)
    # Keys and values of 8 bits: a few per cent of logits of about 2.
    assert np.abs(at_once - whole(name)).max() < 0.2
    everything = logits(
        (4, 3, 1, 1, 1, 1), columns(np.tril(np.ones((2, LENGTH, LENGTH), bool)), 17)
    )
    assert np.abs(everything - at_once)[:, 6:].max() > 0.2


def test_a_mask_of_another_size_is_named():
    config = CONFIGS["ring and full"]
    model, tokens = tiny.model(config), tiny.tokens(2, 3)
    state = tiny.empty_cache(config, (2,), capacity=17)

    def ones(*shape):
        return jnp.ones(shape, bool)

    for wrong in (ones(2, 3, 3), ones(2, 3, 5), ones(2, 1, 17)):
        with pytest.raises(ValueError, match=r"`mask` .*\(2, 3, 17\).* got \(2, [13], (3|5|17)\)"):
            model(tokens, mask=wrong, cache=state)
    with pytest.raises(ValueError, match=r"`mask` .*\(2, 3, 3\).* got \(2, 3, 17\)"):
        model(tokens, mask=ones(2, 3, 17))
    with pytest.raises(TypeError, match="mask"):
        model(tokens, mask=np.ones((2, 3, 3)))


@pytest.mark.slow
def test_where_all_layers_are_local_a_mask_holds_what_was_seen():
    config = CONFIGS["rings alone"]
    model, tokens = tiny.model(config), tiny.tokens(2, LENGTH)
    state = tiny.empty_cache(config, (2,), capacity=5)
    mask, causal = np.tril(np.ones((2, LENGTH, LENGTH), bool)), tiny.run(model, tokens).logits
    for start, end in ((0, 5), (5, 8), (8, 9)):
        # As many columns as there are positions, and more.
        for number in (end, LENGTH):
            part = jnp.asarray(mask[:, start:end, :number])
            output = tiny.run(model, tokens[:, start:end], mask=part, cache=state)
            np.testing.assert_allclose(output.logits, causal[:, start:end], **CLOSE)
        short = jnp.asarray(mask[:, start:end, : end - 1])
        with pytest.raises(ValueError, match=f"`mask` has columns for {end - 1} positions"):
            model(tokens[:, start:end], mask=short, cache=state)
        assert np.isnan(tiny.run(model, tokens[:, start:end], mask=short, cache=state).logits).all()
        state = output.cache
