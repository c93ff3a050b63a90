"""The whole model: float64, every way of calling it, every way through the cache, who sees whom."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
import wadler_lindig
from jaxtyping import TypeCheckError

import equigemma as eg
from equigemma.config import ModelConfig
from equigemma.nn import KVCache


# Two float32 programs for the same sums, a handful of layers deep, with logits of up to 10: they
# differ in the last bits, the largest difference seen is 8e-6.
CLOSE: dict[str, Any] = dict(rtol=0, atol=3e-5)
LENGTH = 13


def check_close(first: eg.Output, second: eg.Output) -> None:
    np.testing.assert_allclose(first.logits, second.logits, **CLOSE)
    np.testing.assert_allclose(first.hidden_states, second.hidden_states, **CLOSE)


@pytest.fixture(scope="module")
def model() -> eg.Transformer:
    """A layer with a window of 5, and one without."""
    return tiny.model(tiny.GEMMA3)


@pytest.fixture(scope="module")
def whole(model) -> eg.Output:
    """Two rows in one pass."""
    return tiny.run(model, tiny.tokens(2, LENGTH))


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_float64(name):
    model = tiny.model(tiny.CONFIGS[name])
    tokens = tiny.tokens(2, LENGTH)
    output = jax.device_get(tiny.run(model, tokens))
    for row in range(2):
        logits, hidden_states = reference.forward(model, np.asarray(tokens)[row])
        np.testing.assert_allclose(output.logits[row], logits, **CLOSE)
        np.testing.assert_allclose(output.hidden_states[row], hidden_states, **CLOSE)


def test_float64_far_into_a_text(model):
    # Distances are what counts, so far out the angles may only cost their rounding.
    positions = tiny.host(np.arange(LENGTH) + 100_003, np.int32)
    output = tiny.run(model, tiny.tokens(LENGTH), positions=positions)
    logits, _ = reference.forward(model, tiny.tokens(LENGTH), positions)
    # An angle of 1e5 has an error of up to 1e-2 in float32, and moves logits by its product with
    # queries and keys; bfloat16 angles would turn anywhere.
    np.testing.assert_allclose(output.logits, logits, atol=0.3)
    assert np.abs(np.asarray(output.logits) - logits).mean() < 0.02


def test_bfloat16_whole_and_in_steps(model):
    narrow = jax.tree.map(lambda leaf: tiny.host(leaf, jnp.bfloat16), model)
    tokens = tiny.tokens(2, LENGTH)
    cache = tiny.empty_cache(model.config, (2,), capacity=LENGTH, dtype=jnp.bfloat16)
    output = tiny.run_in_chunks(narrow, tokens, (LENGTH - 1, 1), cache=cache)
    assert output.logits.dtype == jnp.float32
    assert output.hidden_states.dtype == output.cache.layers[0].k.dtype == jnp.bfloat16
    logits = np.asarray(output.logits)
    for row in range(2):
        expected, _ = reference.forward(narrow, np.asarray(tokens)[row])
        # Every activation is rounded to 8 bits several times a layer: errors of a few per cent.
        error = np.abs(logits[row] - expected)
        assert error.mean() < 0.02 * np.abs(expected).mean()
        assert error.max() < 0.1 * np.abs(expected).max()


def test_hidden_states_are_what_the_logits_are_made_from(model, whole):
    trunk = eqx.filter_jit(lambda model, tokens: model.trunk(tokens))
    hidden_states, cache = trunk(model, tiny.tokens(2, LENGTH))
    assert cache is None
    np.testing.assert_allclose(hidden_states, whole.hidden_states, **CLOSE)
    unembed = eqx.filter_jit(lambda model, x: model.unembed(x))
    np.testing.assert_allclose(unembed(model, hidden_states), whole.logits, **CLOSE)


def test_final_softcap_bounds_logits():
    config = tiny.GEMMA2
    capped = tiny.run(tiny.model(config), tiny.tokens(LENGTH)).logits
    assert config.final_softcap == 3.0
    assert 2.5 < np.abs(capped).max() < 3.0


# --- one function for any batch ------------------------------------------------------------------


def test_any_rank(model, whole):
    tokens = np.asarray(tiny.tokens(2, LENGTH))
    for row in range(2):
        alone = tiny.run(model, jnp.asarray(tokens[row]))
        assert alone.logits.shape == (LENGTH, tiny.VOCAB)
        np.testing.assert_allclose(alone.logits, np.asarray(whole.logits)[row], **CLOSE)
    nested = tiny.run(model, jnp.asarray(tokens[:, None]))
    assert nested.hidden_states.shape == (2, 1, LENGTH, tiny.WIDTH)
    np.testing.assert_allclose(np.asarray(nested.logits)[:, 0], whole.logits, **CLOSE)


def test_vmapped(model, whole):
    mapped = eqx.filter_jit(jax.vmap(lambda tokens: model(tokens)))
    check_close(mapped(tiny.tokens(2, LENGTH)), whole)


def test_vmapped_over_models(whole):
    # Two models as one: a batch of weights.
    models = [tiny.model(tiny.GEMMA3, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *models)
    logits = eqx.filter_jit(eqx.filter_vmap(lambda model, tokens: model(tokens).logits))(
        stacked, tiny.tokens(2, LENGTH)
    )
    other = tiny.run(models[1], tiny.tokens(2, LENGTH)).logits
    expected = [np.asarray(whole.logits)[0], np.asarray(other)[1]]
    np.testing.assert_allclose(logits, expected, **CLOSE)


def test_cached_vmapped_and_nested(model, whole):
    tokens = np.asarray(tiny.tokens(2, LENGTH))[:, :7]
    expected = np.asarray(whole.logits)[:, :7]
    step = eqx.filter_jit(jax.vmap(lambda tokens, cache: model(tokens, cache=cache)))
    mapped = step(jnp.asarray(tokens), tiny.empty_cache(model.config, (2,), capacity=LENGTH))
    np.testing.assert_allclose(mapped.logits, expected, **CLOSE)

    cache = tiny.empty_cache(model.config, (2, 1), capacity=LENGTH)
    nested = tiny.run(model, jnp.asarray(tokens[:, None]), cache=cache)
    np.testing.assert_allclose(np.asarray(nested.logits)[:, 0], expected, **CLOSE)
    for first, second in zip(
        jax.tree.leaves(nested.cache), jax.tree.leaves(mapped.cache), strict=True
    ):
        np.testing.assert_allclose(np.asarray(first)[:, 0], second, **CLOSE)


# --- the cache changes nothing -------------------------------------------------------------------


def full_cache(config: ModelConfig, batch: tuple[int, ...], slots: int) -> eg.Cache:
    """Room for the whole text in every layer, also in those with a window."""

    def layer(attention) -> KVCache:
        zeros = np.zeros((*batch, attention.kv.heads, slots, attention.head_dim))
        return KVCache(tiny.host(zeros, jnp.float32), tiny.host(zeros, jnp.float32))

    layers = tuple(layer(layer_config.attention) for layer_config in config.layers)
    return eg.Cache(layers, tiny.host(np.zeros(batch), np.int32))


CHUNKS = {
    "steps": (1,) * LENGTH,
    "a window and shorter": (5, 3, 5),
    "longer than the ring, then steps": (7, 1, 1, 1, 1, 1, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_ring_is_full_is_none(model, whole, sizes):
    tokens = tiny.tokens(2, LENGTH)
    ring = tiny.empty_cache(model.config, (2,), capacity=LENGTH)
    assert [layer.capacity for layer in ring.layers] == [5, LENGTH]
    check_close(tiny.run_in_chunks(model, tokens, sizes, cache=ring), whole)


def test_full_is_none(model, whole):
    # More room than the text needs, so that some slots stay empty.
    full = full_cache(model.config, (2,), 29)
    sizes = CHUNKS["longer than the ring, then steps"]
    check_close(tiny.run_in_chunks(model, tiny.tokens(2, LENGTH), sizes, cache=full), whole)


def test_less_room_than_a_window(model, whole):
    # Four slots hold a text of four in every layer, also in the one with a window of five.
    cache = tiny.empty_cache(model.config, (2,), capacity=4)
    tokens = np.asarray(tiny.tokens(2, LENGTH))[:, :4]
    output = tiny.run_in_chunks(model, tokens, (3, 1), cache=cache)
    np.testing.assert_allclose(output.logits, np.asarray(whole.logits)[:, :4], **CLOSE)


# --- rows of different lengths -------------------------------------------------------------------

LENGTHS = (LENGTH, 7, 1, 0)


def ragged(tokens, lengths, *, before: bool) -> tuple[jax.Array, jax.Array]:
    """Rows cut to `lengths`: the tokens, and positions with −1 for padding before or after."""
    tokens = np.asarray(tokens)
    size = tokens.shape[-1]
    positions = np.full(tokens.shape, -1, np.int32)
    padded = np.zeros(tokens.shape, np.int32)
    for row, length in enumerate(lengths):
        place = slice(size - length, size) if before else slice(0, length)
        positions[row, place] = np.arange(length)
        padded[row, place] = tokens[row, :length]
    return jnp.asarray(padded), jnp.asarray(positions)


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["padding before", "padding after"])
def test_ragged_rows_are_as_alone(model, before):
    tokens = tiny.tokens(4, LENGTH)
    alone = np.asarray(tiny.run(model, tokens).logits)
    padded, positions = ragged(tokens, LENGTHS, before=before)
    cache = tiny.empty_cache(model.config, (4,), capacity=LENGTH)
    for output in (
        tiny.run(model, padded, positions=positions),
        tiny.run_in_chunks(model, padded, (7, 6), cache=cache, positions=positions),
    ):
        logits = np.asarray(output.logits)
        assert np.isfinite(logits).all()
        for row, length in enumerate(LENGTHS):
            real = np.asarray(positions)[row] >= 0
            # What a row gives alone does not depend on what comes after, so a prefix will do.
            np.testing.assert_allclose(logits[row][real], alone[row, :length], **CLOSE)
        if output.cache is not None:
            assert output.cache.length.tolist() == list(LENGTHS)


@pytest.mark.parametrize("before", [True, False], ids=["padding before", "padding after"])
def test_ragged_rows_continue_as_alone(model, before):
    tokens = np.asarray(tiny.tokens(4, LENGTH))
    alone = np.asarray(tiny.run(model, jnp.asarray(tokens)).logits)
    lengths = np.array((7, 5, 1, 0))
    padded, positions = ragged(tokens[:, :7], lengths, before=before)
    cache = tiny.empty_cache(model.config, (4,), capacity=LENGTH)
    output = tiny.run(model, padded, positions=positions, cache=cache)

    # Two more tokens for every row, at positions that the cache knows.
    rows = np.arange(4)
    places = lengths[:, None] + np.arange(2)
    output = tiny.run(model, jnp.asarray(tokens[rows[:, None], places]), cache=output.cache)
    np.testing.assert_allclose(output.logits, alone[rows[:, None], places], **CLOSE)
    lengths += 2

    # One step for all rows but the third, which rests and then goes on.
    resting = np.where(rows == 2, -1, lengths)[:, None].astype(np.int32)
    output = tiny.run(
        model,
        jnp.asarray(tokens[rows, lengths][:, None]),
        positions=jnp.asarray(resting),
        cache=output.cache,
    )
    moved = rows[rows != 2]
    np.testing.assert_allclose(
        np.asarray(output.logits)[moved, 0], alone[moved, lengths[moved]], **CLOSE
    )
    lengths[moved] += 1
    assert output.cache.length.tolist() == lengths.tolist()
    output = tiny.run(model, jnp.asarray(tokens[rows, lengths][:, None]), cache=output.cache)
    np.testing.assert_allclose(np.asarray(output.logits)[:, 0], alone[rows, lengths], **CLOSE)


def test_a_mask_replaces_causality_and_keeps_windows(model, whole):
    tokens = tiny.tokens(2, LENGTH)
    causal = jnp.asarray(np.tril(np.ones((2, LENGTH, LENGTH), bool)))
    check_close(tiny.run(model, tokens, mask=causal), whole)
    everything = tiny.run(model, tokens, mask=jnp.ones((2, LENGTH, LENGTH), bool))
    change = np.abs(np.asarray(everything.logits) - np.asarray(whole.logits))
    assert change[:, 0].max() > 0.1


# --- who sees whom -------------------------------------------------------------------------------


def influence(config: ModelConfig, chunks: tuple[int, ...] | None) -> np.ndarray:
    """`[L L]`: whether the hidden state at a row changes with the embedding at a column."""
    model = tiny.model(config)
    tokens = jnp.arange(LENGTH)  # every token once, so that a row of the table is a place
    direction = tiny.normal(0, tiny.WIDTH)

    def hidden_states(shift):
        nudged = eqx.tree_at(
            lambda model: model.embedding.weight,
            model,
            replace_fn=lambda table: table.at[tokens].add(shift[:, None] * direction[None]),
        )
        if chunks is None:
            return nudged.trunk(tokens)[0]
        cache, hidden = eg.init_cache(config, capacity=LENGTH), []
        for part in jnp.split(tokens, np.cumsum(chunks)[:-1]):
            x, cache = nudged.trunk(part, cache=cache)
            hidden.append(x)
        return jnp.concatenate(hidden)

    jacobian = jax.jit(jax.jacfwd(hidden_states))(jnp.zeros(LENGTH))
    return (np.asarray(jacobian) != 0).any(axis=1)


def within(reach: int | None) -> np.ndarray:
    """Each row sees itself and up to `reach` before it."""
    distance = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
    return (distance >= 0) & (distance <= (LENGTH if reach is None else reach))


REACH = {
    "full": (tiny.GEMMA1_MQA, None, None),
    "window": (tiny.model_config(tiny.layer(window=5, qk_norm=True)), None, 4),
    "window of one": (tiny.model_config(tiny.layer(window=1)), None, 0),
    "two windows": (tiny.model_config(tiny.layer(window=5), tiny.layer(window=3)), None, 4 + 2),
    "window, cached": (tiny.model_config(tiny.layer(window=5, qk_norm=True)), (6, 1, 6), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REACH)
def test_influence(name):
    config, chunks, reach = REACH[name]
    seen = influence(config, chunks)
    np.testing.assert_array_equal(seen, within(reach))
    if reach:
        # Said once more in words: a window of W reaches back W − 1, and no further.
        last = LENGTH - 1
        assert seen[last, last - reach]
        assert not seen[last, last - reach - 1] and not seen[last, last - reach - 2]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "options", "error", "words"),
    [
        (jnp.zeros(3), {}, TypeCheckError, r"`tokens` .*float32\[3\]"),
        (jnp.asarray(3), {}, TypeCheckError, "`tokens` must be"),
        (jnp.arange(3), {"positions": jnp.arange(4)}, ValueError, r"`positions` .*\(3,\).*\(4,\)"),
        (
            jnp.arange(3),
            {"positions": jnp.zeros((2, 3), int)},
            TypeCheckError,
            r"`positions` .* where B = \(\)",
        ),
        (
            jnp.arange(3),
            {"mask": jnp.ones((5, 3), bool)},
            ValueError,
            r"`mask` .*\(3, 3\).*\(5, 3\)",
        ),
        (jnp.arange(3), {"mask": jnp.ones((3, 3))}, TypeCheckError, "`mask` must be Bool"),
    ],
)
def test_wrong_dtypes_and_axes_are_named(model, tokens, options, error, words):
    with pytest.raises(error, match=words):
        model(tokens, **options)


# --- a model is a value --------------------------------------------------------------------------


def test_repr_is_one_line(model):
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert repr(model) == f"Transformer(2 layers, {size:,} parameters, float32)"
    nothing = jax.tree.map(lambda leaf: None, model)
    assert repr(nothing) == "Transformer(2 layers, 0 parameters, no arrays)"
    mixed = eqx.tree_at(
        lambda m: m.embedding.weight, model, replace_fn=lambda w: tiny.host(w, jnp.bfloat16)
    )
    assert repr(mixed).endswith("bfloat16 and float32)")
    # All of it is still there for who wants to see it.
    whole = wadler_lindig.pformat(model, respect_pdoc=False, width=100)
    assert "q=Einsum(weight=f32[6,13,10](jax), eqn='...D,NDH->...NH')" in whole


def test_a_model_is_a_pytree_of_arrays(model):
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model))
    shapes = eqx.filter_eval_shape(eg.Transformer, model.config, key=jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(model)
    assert model.dtype == jnp.float32


def test_fresh_weights():
    dtype = jnp.bfloat16
    build = eqx.filter_jit(lambda key: eg.Transformer(tiny.GEMMA3, key=key, dtype=dtype))
    first, second = build(jax.random.key(0)), build(jax.random.key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {jnp.dtype(dtype)}
    assert first.dtype == dtype
    weights = [
        (a, b)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        if a.ndim > 1
    ]
    # No two layers and no two keys share their numbers.
    starts = {tuple(np.asarray(a).flat[:5].tolist()) for a, _ in weights}
    assert len(starts) == len(weights) == 1 + 2 * 5
    assert all(not np.array_equal(a, b) for a, b in weights)
