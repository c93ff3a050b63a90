"""Adapters of embeddings and output projections, against numpy in float64."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import lora, quantize, train


TIED, UNTIED = tiny.GEMMA3, replace(tiny.GEMMA3, lm_head="untied")
PLACES = {
    "embedding": ("embedding",),
    "head": ("lm_head",),
    "both": ("embedding", "lm_head"),
}
CASES = [(config, places) for config in (TIED, UNTIED) for places in PLACES]


@pytest.fixture(autouse=True, scope="module")
def promotion():
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        yield


def drawn(model, seed: int = 0):
    """The model with random numbers in its adapters, as if they had learned."""
    rng = np.random.default_rng(seed)
    adapters, rest = lora.split(model)
    adapters = jax.tree.map(
        lambda leaf: tiny.host(rng.normal(size=leaf.shape) * 0.3, leaf.dtype), adapters
    )
    return eqx.combine(adapters, rest)


def fresh(config=TIED, places: str = "both", **options) -> eg.Transformer:
    options = {"rank": 3, "alpha": 5.0, "key": jax.random.key(0)} | options
    return lora.add(tiny.model(config), where=lambda path, part: path in PLACES[places], **options)


def logits(model) -> np.ndarray:
    return np.asarray(tiny.run(model, tiny.tokens(2, 7)).logits)


def check_close(actual, expected) -> None:
    # Sums of a few units in float32, taken in another order, layer after layer.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-5)


def by_hand(model: eg.Transformer) -> eg.Transformer:
    """The untied model whose two tables have the adapters added, in float64."""
    tables = {}
    for name, use in (("embedding", "encode"), ("lm_head", "decode")):
        part = model.embedding if model.lm_head is None else getattr(model, name)
        table = 0.0
        while isinstance(part, lora.LoRAEmbedding):
            if part.use in (use, "both"):
                up, down = (np.asarray(x, np.float64) for x in (part.up, part.down))
                table = table + part.scale * up @ down
            part = part.base
        tables[name] = tiny.host(np.asarray(part.weight, np.float64) + table, np.float32)
    plain = tiny.model(UNTIED)
    return eqx.tree_at(
        lambda m: (m.embedding.weight, m.lm_head.weight),
        plain,
        (tables["embedding"], tables["lm_head"]),
    )


@pytest.mark.parametrize(("config", "places"), CASES)
def test_new_ones_change_nothing_and_others_are_sums_of_tables(config, places):
    model = fresh(config, places)
    check_close(logits(model), logits(tiny.model(config)))
    model = drawn(model)
    expected = logits(by_hand(model))
    assert np.abs(expected - logits(tiny.model(config))).max() > 0.1
    check_close(logits(model), expected)
    assert set(lora.adapters(model)) == set(PLACES[places])
    assert eqx.tree_equal(lora.remove(model), tiny.model(config))


@pytest.mark.parametrize(("config", "places"), CASES)
def test_merging_unties_what_is_two_tables(config, places):
    model = drawn(fresh(config, places))
    merged = lora.merge(model)
    assert merged.config.lm_head == "untied" and merged.lm_head is not None
    assert type(merged.embedding) is type(merged.lm_head) is eg.nn.Embedding
    check_close(logits(merged), logits(model))
    assert not lora.adapters(merged)


def test_one_adapter_for_both_uses_stays_tied():
    model = drawn(fresh(TIED, "embedding"))
    model = eqx.tree_at(lambda m: m.embedding, model, replace(model.embedding, use="both"))
    merged = lora.merge(model)
    assert merged.config == TIED and merged.lm_head is None
    check_close(logits(merged), logits(model))
    check_close(logits(model), logits(by_hand(model)))


def test_untied_begins_as_the_same_model():
    model = tiny.model(TIED)
    other = model.untied()
    assert other.config == UNTIED and other.untied() is other
    np.testing.assert_array_equal(logits(other), logits(model))
    assert jax.tree.structure(other) == jax.tree.structure(tiny.model(UNTIED))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "places"), CASES)
@pytest.mark.parametrize("narrow", [lambda m: m, quantize.int8, quantize.int4])
def test_gradients_are_those_of_the_logits(config, places, narrow):
    model = narrow(drawn(fresh(config, places)))
    learned, frozen = lora.split(model)
    rng = np.random.default_rng(0)
    texts = [train.Example(rng.integers(0, tiny.VOCAB, n), np.ones(n)) for n in (9, 4, 11)]
    batch = next(train.pack(texts, length=13, rows=2))

    def chunked(learned):
        return train.next_token_loss(eqx.combine(learned, frozen), batch, chunk=5)[0]

    def all_at_once(learned):
        model = eqx.combine(learned, frozen)
        hidden, _ = model.trunk(batch.tokens, positions=batch.positions, segments=batch.segments)
        log_p = jax.nn.log_softmax(model.unembed(hidden))
        chosen = jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
        return -jnp.sum(chosen * batch.weights)

    value, grads = jax.jit(jax.value_and_grad(chunked))(learned)
    expected, expected_grads = jax.jit(jax.value_and_grad(all_at_once))(learned)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, reference in zip(
        jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        scale = float(np.abs(reference).max())
        assert scale > 0.01
        # Sums of some tens of terms, in another order.
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-4 * max(scale, 1))


def test_they_learn():
    import optax

    model = fresh(TIED, "both")
    optimizer = optax.adam(1e-2)
    state = train.init(model, optimizer, trainable=lora.trainable(model))
    assert len(jax.tree.leaves(state.model)) == 4
    step = train.make_step(train.next_token_loss, optimizer)
    texts = [train.Example(np.arange(11) % tiny.VOCAB, np.ones(11))]
    batch = next(train.pack(texts, length=11, rows=1))
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.5
    learned = train.merge(state)
    np.testing.assert_array_equal(
        lora.remove(learned).embedding.weight, tiny.model(TIED).embedding.weight
    )


@pytest.mark.parametrize("places", PLACES)
def test_they_move_between_models(places):
    model = drawn(fresh(TIED, places))
    narrow = quantize.int8(model)
    assert isinstance(narrow.embedding, lora.LoRAEmbedding)
    back = lora.transfer(narrow, tiny.model(TIED))
    assert eqx.tree_equal(back, model)
    # A tied model's go to the two parts of an untied one.
    apart = lora.transfer(model, tiny.model(UNTIED))
    assert set(lora.adapters(apart)) == set(PLACES[places])
    check_close(logits(apart), logits(by_hand(apart)))


def test_one_of_them_for_each_row():
    models = [drawn(fresh(TIED, "both"), seed) for seed in range(2)]
    several = lora.stack([lora.split(model)[0] for model in models])
    frozen = lora.split(models[0])[1]
    tokens = tiny.tokens(2, 7)
    found = jax.jit(jax.vmap(lambda a, t: eqx.combine(a, frozen)(t).logits))(several, tokens)
    for row, model in enumerate(models):
        check_close(found[row], tiny.run(model, tokens[row]).logits)


def test_a_second_one_goes_around_the_first():
    first = drawn(fresh(TIED, "both"))
    second = lora.add(
        first, rank=2, key=jax.random.key(1), where=lambda path, _: path == "lm_head", nested=True
    )
    assert [layer.use for layer in lora._tree.layers(second.embedding)] == [
        "decode",
        "encode",
        "decode",
    ]
    check_close(logits(second), logits(first))
    check_close(logits(lora.merge(drawn(second))), logits(drawn(second)))
    assert set(lora.adapters(second)) == {"embedding", "lm_head"}
    check_close(logits(lora.transfer(drawn(second), tiny.model(TIED))), logits(drawn(second)))


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 100_000}, "rank=100000 is more than any weight chosen has, which is 13: it"),
        ({"rank": 2.5}, "a rank of at least 1, a whole number; got 2.5"),
        ({"rank": True}, "a rank of at least 1, a whole number; got True"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"kind": "doora"}, "kind is 'lora' or 'dora', got 'doora'"),
        ({"scaling": "rank"}, r"scaling is 'alpha/rank' or 'alpha/sqrt\(rank\)', got 'rank'"),
        ({"key": 0}, r"key must be a key such as jax.random.key\(0\), got 0"),
        ({"kind": 5}, "kind is .lora. or .dora., got 5"),
        ({"kind": "dora"}, "DoRA is for projections; embedding is an embedding"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        fresh(**options)


def test_twice():
    with pytest.raises(ValueError, match="embedding has an adapter already: fold it in with lora"):
        lora.add(fresh(), rank=2, key=KEY, where=lambda path, _: path == "embedding")
    adapted = lora.add(tiny.model(TIED), rank=2, key=KEY)
    with pytest.raises(ValueError, match="layers.0.attention.projection.q has an adapter already"):
        lora.add(adapted, rank=2, key=KEY)


def test_a_table_in_8_bits_takes_none_in():
    with pytest.raises(ValueError, match="only a dense table can take an adapter in, this one is"):
        lora.merge(quantize.int8(drawn(fresh())))
    with pytest.raises(ValueError, match="keep=True is for projections"):
        lora.merge(drawn(fresh()), keep=True)
