"""What a model takes: ids of any integer type, and what cannot be computed is an error or NaN."""

from dataclasses import replace
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import quantize, train
from equigemma.nn import init_cache
from equigemma.nn._vision import merge_embeddings


LENGTH = 6
CONFIGS = tiny.CONFIGS | {"local alone": tiny.model_config(tiny.layer(window=tiny.WINDOW))}


@cache
def model_of(name: str) -> eg.Transformer:
    kind, _, form = name.partition(", ")
    forms = {
        "": lambda model: model,
        "int8": quantize.int8,
        "int8/8": partial(quantize.int8, group_size=8),
    }
    return forms[form](tiny.model(CONFIGS[kind]))


def rows_of(output: eg.Output) -> np.ndarray:
    return np.asarray(output.logits)


# --- token ids -----------------------------------------------------------------------------------

WRONG = [tiny.VOCAB, -1, -2, 2**31 - 1, -(2**31)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGS, "gemma3, int8", "gemma4 small, int8/8"])
def test_an_id_outside_of_the_vocabulary_is_an_error_or_nan(name):
    model, tokens = model_of(name), np.array(tiny.tokens(3, LENGTH))
    expected = rows_of(tiny.run(model, tokens))
    assert np.isfinite(expected).all()
    for wrong in WRONG:
        spoiled = tokens.copy()
        spoiled[1, 2] = wrong
        logits = rows_of(tiny.run(model, jnp.asarray(spoiled)))
        assert np.isnan(logits[1, 2:]).all()
        # Rows know nothing of each other, to the last bit.
        np.testing.assert_array_equal(logits[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("wrong", WRONG)
def test_an_id_outside_of_the_vocabulary_is_named(wrong):
    model, tokens = model_of("gemma3"), np.array(tiny.tokens(3, LENGTH))
    tokens[2, 4] = wrong
    words = f"`tokens` holds the id {wrong}, and the vocabulary ends at {tiny.VOCAB - 1}"
    for call in (model, model.trunk):
        with pytest.raises(ValueError, match=words):
            call(jnp.asarray(tokens))


@pytest.mark.parametrize("form", ["", ", int8", ", int8/8"])
def test_an_embedding_gives_nan_for_what_it_does_not_have(form):
    embedding = model_of(f"gemma3{form}").embedding
    ids = jnp.asarray([0, tiny.VOCAB - 1, *WRONG])
    rows = np.asarray(jax.jit(lambda ids: embedding.encode(ids))(ids))
    assert np.isfinite(rows[:2]).all() and np.isnan(rows[2:]).all()


def test_a_soft_token_that_there_is_not_is_nan():
    soft = tiny.normal(0, 2, 3, tiny.WIDTH)  # two images of three
    x = tiny.normal(1, 4, tiny.WIDTH)
    merged = np.asarray(merge_embeddings(x, jnp.asarray([5, -2, -7, -8]), soft))
    np.testing.assert_array_equal(merged[0], x[0])
    np.testing.assert_array_equal(merged[1:3], np.asarray(soft).reshape(6, -1)[[0, 5]])
    assert np.isnan(merged[3]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gemma3n", "gemma4 small"])
def test_padding_is_any_token_at_position_minus_one(name):
    model, tokens = model_of(name), np.array(tiny.tokens(2, LENGTH))
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    positions[1, 4:] = -1
    expected = rows_of(tiny.run(model, tokens[1, :4]))
    tokens[1, 4:] = -1
    for call in (model, partial(tiny.run, model)):
        logits = rows_of(call(jnp.asarray(tokens), positions=jnp.asarray(positions)))
        np.testing.assert_allclose(logits[1, :4], expected, rtol=1e-5, atol=1e-5)


def test_a_loss_over_an_id_that_there_is_not():
    model = model_of("gemma3")
    batch = next(train.pack([train.Example([3, 4, 5], np.ones(3))], length=4, rows=1))
    batch = eqx.tree_at(lambda batch: batch.tokens, batch, batch.tokens.at[0, 1].set(-2))
    with pytest.raises(ValueError, match="from -2"):
        train.next_token_loss(model, batch)
    untied = tiny.model(replace(tiny.GEMMA3, lm_head="untied"))
    for each in (model, untied, model_of("gemma3, int8")):
        assert np.isnan(jax.jit(train.next_token_loss)(each, batch)[0])


def as_kinds(tokens: np.ndarray) -> dict:
    return {
        "list": tokens.tolist(),
        "tuple of arrays": tuple(jnp.asarray(tokens)),
        "numpy": tokens,
        **{name: tokens.astype(name) for name in ("int8", "int64", "uint8", "uint16", "uint64")},
        **{f"jax {name}": jnp.asarray(tokens, name) for name in ("int8", "uint8", "uint32")},
    }


def test_tokens_and_positions_of_any_integer_type():
    model, tokens = model_of("gemma3"), np.array(tiny.tokens(2, LENGTH))
    positions = np.tile(np.arange(3, 3 + LENGTH), (2, 1))
    expected = rows_of(model(jnp.asarray(tokens), positions=jnp.asarray(positions)))
    given = zip(as_kinds(tokens).items(), as_kinds(positions).values(), strict=True)
    for (name, ids), places in given:
        logits = rows_of(model(ids, positions=places))
        np.testing.assert_array_equal(logits, expected, err_msg=name)
    mask = np.tril(np.ones((2, LENGTH, LENGTH), bool))
    np.testing.assert_allclose(
        rows_of(model(tokens, mask=mask)), rows_of(model(tokens)), rtol=1e-5, atol=1e-5
    )


def test_ids_that_are_too_large_for_32_bits_are_none():
    model = model_of("gemma3")
    for wrong in (np.array([2**32 + 3]), np.array([2**63], np.uint64), np.array([-(2**40)])):
        with pytest.raises(ValueError, match="`tokens` holds the id"):
            model(wrong)
    beyond = jnp.asarray([2**32 - 1], jnp.uint32)
    assert np.isnan(rows_of(tiny.run(model, beyond))).all()


@pytest.mark.slow
def test_lists_of_traced_ids():
    model = model_of("gemma3")
    together = jax.jit(lambda a, b: model([a, b]).logits)(jnp.asarray(3), jnp.asarray(5))
    np.testing.assert_allclose(together, rows_of(model([3, 5])), rtol=1e-5, atol=1e-5)


def test_a_cache_of_sizes_and_dtypes_as_people_have_them():
    config = tiny.GEMMA3
    expected = init_cache(config, (2,), capacity=7, dtype=jnp.bfloat16)
    for batch, capacity, dtype in (
        (2, 7, "bfloat16"),
        ([2], np.int64(7), jnp.dtype("bfloat16")),
        (np.int32(2), jnp.asarray(7), "bfloat16"),
    ):
        made = init_cache(config, batch, capacity=capacity, dtype=dtype)
        assert jax.tree.map(jax.typeof, made) == jax.tree.map(jax.typeof, expected)
    model = eg.Transformer(config, key=jax.random.key(0), dtype="bfloat16")
    assert model.dtype == jnp.bfloat16


# --- the room of a cache -------------------------------------------------------------------------

CAPACITY = 7


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("name", ["gemma1 mqa", "gemma3", "gemma3n", "gemma4 small"])
@pytest.mark.parametrize("new", [1, 3])
def test_rows_that_a_cache_has_no_room_for_are_nan(name, dtype, new):
    model, tokens = model_of(name), np.array(tiny.tokens(3, CAPACITY + 1))

    def continued(lengths):
        """Rows of some lengths, and then `new` more tokens of each."""
        positions = np.where(
            np.arange(CAPACITY) < np.array(lengths)[:, None], np.arange(CAPACITY), -1
        )
        empty = tiny.empty_cache(model.config, (3,), capacity=CAPACITY, dtype=dtype)
        before = tiny.run(model, tokens[:, :CAPACITY], positions=positions, cache=empty)
        return tiny.run(model, tokens[:, :new], cache=before.cache)

    fitting, full = continued([4, 4, 2]), continued([4, CAPACITY + 1 - new, 2])
    assert np.isfinite(rows_of(fitting)).all()
    assert np.isnan(rows_of(full)[1]).all()
    assert np.isnan(np.asarray(full.hidden_states)[1]).all()
    np.testing.assert_array_equal(rows_of(full)[[0, 2]], rows_of(fitting)[[0, 2]])
    # And it stays so.
    assert np.isnan(rows_of(tiny.run(model, tokens[:, :1], cache=full.cache))[1]).all()
    with pytest.raises(
        ValueError, match=f"capacity of {CAPACITY} tokens, .* make it {CAPACITY + 2}"
    ):
        model(tokens[:, :1], cache=full.cache)


def test_local_layers_are_never_full():
    model, tokens = model_of("local alone"), tiny.tokens(2, 3 * CAPACITY)
    cache = tiny.empty_cache(model.config, (2,), capacity=CAPACITY)
    output = tiny.run_in_chunks(model, tokens, [CAPACITY] * 3, cache=cache)
    np.testing.assert_allclose(
        output.logits, rows_of(tiny.run(model, tokens)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "positions", [[4, 5, 6], [2, 3, 4], [3, 5, 6], [3, 3, 4], [5, 4, 3], [3, -1, 4], [0, 1, 2]]
)
def test_positions_that_do_not_continue_the_cache(positions):
    model, tokens = model_of("gemma3"), tiny.tokens(2, 3)
    empty = tiny.empty_cache(model.config, (2,), capacity=CAPACITY)
    cache = tiny.run(model, tokens, cache=empty).cache
    right = jnp.asarray([[3, 4, 5], [3, 4, 5]])
    wrong = jnp.asarray([[3, 4, 5], positions])
    expected = rows_of(tiny.run(model, tokens, positions=right, cache=cache))
    logits = rows_of(tiny.run(model, tokens, positions=wrong, cache=cache))
    np.testing.assert_array_equal(logits[0], expected[0])
    assert np.isnan(logits[1]).all()
    with pytest.raises(ValueError, match="`positions` must continue what `cache` holds, from 3 on"):
        model(tokens, positions=wrong, cache=cache)
