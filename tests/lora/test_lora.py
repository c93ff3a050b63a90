"""Adapters: what they compute, against numpy in float64; and every way in which they are moved."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import equigemma as eg
from equigemma import lora, quantize, train
from equigemma._kernels import activation_axes, weight_axes


LENGTH = 7


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
        lambda leaf: tiny.host(rng.normal(size=leaf.shape) * 0.3 + 0.1, leaf.dtype), adapters
    )
    return eqx.combine(adapters, rest)


def adapted(config=tiny.GEMMA3, seed: int = 0, **options) -> eg.Transformer:
    model = tiny.model(config)
    return drawn(lora.add(model, rank=3, alpha=5.0, key=jax.random.key(0), **options), seed)


def logits(model, tokens=None):
    return tiny.run(model, tiny.tokens(2, LENGTH) if tokens is None else tokens).logits


def wide(array) -> np.ndarray:
    return np.asarray(array, np.float64)


def check_close(actual, expected) -> None:
    # Sums of a few units in float32, taken in another order, layer after layer.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
# Every layout of projections and gates, layers that share keys, and experts.
@pytest.mark.parametrize("name", ["gemma1 mha", "gemma3", "gemma3n", "gemma4 experts"])
def test_new_adapters_change_nothing_and_merged_ones_compute_the_same(name, kind):
    config = tiny.CONFIGS[name]
    fresh = lora.add(tiny.model(config), rank=3, key=jax.random.key(0), kind=kind)
    plain = logits(tiny.model(config))
    check_close(logits(fresh), plain)
    model = drawn(fresh)
    merged = lora.merge(model)
    assert jax.tree.structure(merged) == jax.tree.structure(tiny.model(config))
    actual = logits(model)
    assert np.abs(actual - plain).max() > 0.01
    check_close(logits(merged), actual)


def by_hand(adapter, kind: str) -> np.ndarray:
    """The weight with its adapter, in float64: equation 5 of DoRA, with A and B of LoRA."""
    weight, down, up = map(wide, (adapter.base.weight, adapter.down, adapter.up))
    change = {
        "...D,NDH->...NH": lambda: np.einsum("dr,rnh->ndh", down, up),
        "...D,CKDH->...CKH": lambda: np.einsum("cdr,crkh->ckdh", down, up),
        "...NH,NHD->...D": lambda: np.einsum("nhr,rd->nhd", down, up),
        "...D,CFD->...CF": lambda: np.einsum("cdr,crf->cfd", down, up),
        "...F,FD->...D": lambda: np.einsum("fr,rd->fd", down, up),
    }[adapter.eqn]()
    whole = weight + adapter.scale * change
    if kind == "lora":
        return whole
    axis = {"NDH": 1, "CKDH": 2, "NHD": (0, 1), "CFD": 2, "FD": 0}[
        adapter.eqn.split(",")[1].split("->")[0]
    ]
    length = np.sqrt(np.square(whole).sum(axis=axis, keepdims=True))
    return whole / length * wide(adapter.magnitude).reshape(length.shape)


@pytest.mark.parametrize("scaling", ["alpha/rank", "alpha/sqrt(rank)"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_weights_are_those_of_the_formula(kind, scaling):
    model = adapted(kind=kind, scaling=scaling)
    merged = dict(lora.einsums(lora.merge(model)))
    found = lora.adapters(model)
    assert len(found) == 10
    for path, adapter in found.items():
        expected = 5 / 3 if scaling == "alpha/rank" else 5 / 3**0.5
        assert adapter.scale == pytest.approx(expected)
        # One rounding of weights of about 1 to float32, and few of sums of three.
        np.testing.assert_allclose(merged[path].weight, by_hand(adapter, kind), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_merged_and_unmerged_is_bit_for_bit_what_it_was(kind, dtype):
    model = tiny.model(tiny.GEMMA3)
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
    model = drawn(lora.add(model, rank=3, key=jax.random.key(0), kind=kind))
    merged = lora.merge(model, keep=True)
    np.testing.assert_array_equal(logits(merged), logits(lora.merge(model)))
    assert eqx.tree_equal(lora.unmerge(merged), model)
    with pytest.raises(ValueError, match="keeps no adapters to unmerge"):
        lora.unmerge(lora.merge(model))


@pytest.mark.slow
def test_adapters_are_taken_off():
    model = tiny.model(tiny.GEMMA3)
    assert eqx.tree_equal(lora.remove(adapted()), model)
    twice = lora.add(adapted(), rank=2, key=jax.random.key(1), kind="dora", nested=True)
    check_close(logits(twice), logits(adapted()))
    assert eqx.tree_equal(lora.remove(twice), model)
    check_close(logits(lora.merge(drawn(twice))), logits(drawn(twice)))


def test_routers_are_left_alone_and_experts_have_adapters_of_their_own():
    model = adapted(tiny.GEMMA4_MOE)
    found = lora.adapters(model)
    assert not any("router" in path for path in found)
    gate = found["layers.0.ffw.experts.gate"]
    assert gate.down.shape == (7, 2, 13, 3) and gate.up.shape == (7, 2, 3, 5)


def test_adapters_go_where_they_are_told():
    def where(path, einsum):
        return "attention" in path and einsum.eqn.endswith("NH")

    model = lora.add(tiny.model(tiny.GEMMA3), rank=2, key=jax.random.key(0), where=where)
    names = [f"layers.{index}.attention.projection.q" for index in range(2)]
    assert list(lora.adapters(model)) == names
    marked = [leaf for leaf in jax.tree.leaves(lora.trainable(model)) if leaf]
    assert len(marked) == 4


# --- over weights of eight bits ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_over_8_bit_weights_an_adapter_computes_what_it_does_over_their_values(kind):
    model = quantize.int8(adapted(kind=kind))
    projection = model.layers[0].attention.projection
    assert isinstance(projection.q.base, quantize.Int8Einsum)
    assert isinstance(projection.q, lora.Adapter)
    check_close(logits(model), logits(quantize.dequantize(model)))


@pytest.mark.slow
def test_over_8_bit_weights_only_adapters_learn_and_get_back_to_the_full_weights():
    plain = tiny.model(tiny.GEMMA3)
    model = quantize.int8(lora.add(plain, rank=3, key=jax.random.key(0)))
    optimizer = optax.adam(1e-2)
    state = train.init(model, optimizer, trainable=lora.trainable(model))
    frozen = jax.tree.leaves(state.frozen)
    assert {"int8", "float32"} == {leaf.dtype.name for leaf in frozen}
    rng = np.random.default_rng(1)
    texts = [train.Example(rng.integers(0, tiny.VOCAB, 9), np.ones(9)) for _ in range(3)]
    batch = next(train.pack(texts, length=9, rows=3))
    step = train.make_step(train.next_token_loss, optimizer)
    losses = []
    for _ in range(9):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.1

    learned = train.merge(state)
    with pytest.raises(ValueError, match="this one is a Int8Einsum. See `lora.transfer`"):
        lora.merge(learned)
    back = lora.transfer(learned, plain)
    assert eqx.tree_equal(lora.remove(back), plain)
    for path, adapter in lora.adapters(learned).items():
        np.testing.assert_array_equal(lora.adapters(back)[path].up, adapter.up)
    total, weight = jax.jit(train.next_token_loss)(lora.merge(back), batch)
    # What eight bits cost is far less than what was learned.
    assert abs(total / weight - losses[-1]) < 0.1 * (losses[0] - losses[-1])


# Keys and values of one weight, and queries with them.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma1 mha", "gemma3"])
def test_adapters_of_bfloat16_compute_and_learn_what_those_of_float32_do(name):
    def answer(adapter, x):
        result = adapter(x)
        return jnp.sum(jnp.square(result.astype(jnp.float32))), result

    run = jax.jit(jax.value_and_grad(answer, has_aux=True))
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapted(tiny.CONFIGS[name]))
    for part in lora.adapters(model.layers[0]).values():
        sizes = dict(zip(weight_axes(part.eqn), part.base.weight.shape, strict=True))
        x = tiny.normal(1, LENGTH, *(sizes[axis] for axis in activation_axes(part.eqn)))
        x = x.astype(jnp.bfloat16)
        (_, ours), grads = run(part, x)
        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), part)
        (_, theirs), exact_grads = run(exact, x.astype(jnp.float32))
        assert ours.dtype == grads.up.dtype == jnp.bfloat16
        for left, right in zip(
            jax.tree.leaves((ours, grads)),
            jax.tree.leaves((theirs, exact_grads)),
            strict=True,
        ):
            # The result is rounded to eight bits, what lies between the factors too.
            error = np.linalg.norm(wide(left) - wide(right))
            assert error < 2**-7 * np.linalg.norm(wide(right))


@pytest.mark.slow
def test_an_8_bit_table_is_made_floats_block_by_block_and_cannot_learn():
    model = quantize.int8(adapted(tiny.GEMMA2))
    rng = np.random.default_rng(1)
    texts = [train.Example(rng.integers(0, tiny.VOCAB, 9), np.ones(9)) for _ in range(3)]
    batch = next(train.pack(texts, length=9, rows=3))

    def grads(model):
        adapters, rest = lora.split(model)

        def loss(adapters):
            return train.next_token_loss(eqx.combine(adapters, rest), batch)[0]

        return jax.jit(jax.value_and_grad(loss))(adapters)

    value, gradient = grads(model)
    expected, expected_gradient = grads(quantize.dequantize(model))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for left, right in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        # Float32 sums in another order, of grads of up to 100.
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-3)

    with pytest.raises(ValueError, match="Int8Embedding cannot learn"):
        loss = eqx.filter_grad(lambda model: train.next_token_loss(model, batch)[0])
        eqx.filter_eval_shape(loss, model)


def test_a_prepared_model_runs_with_adapters():
    model = adapted()
    check_close(logits(eg.prepare(model)), logits(model))


# --- several adapters ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_each_row_runs_with_an_adapter_of_its_own(kind):
    models = [adapted(seed=seed, kind=kind) for seed in range(3)]
    several = lora.stack([lora.split(model)[0] for model in models])
    frozen = lora.split(models[0])[1]
    tokens, which = tiny.tokens(4, LENGTH), jnp.asarray([2, 0, 2, 1])

    @jax.jit
    @jax.vmap
    def run(adapter, tokens):
        return eqx.combine(adapter, frozen)(tokens).logits

    together = run(lora.take(several, which), tokens)
    for row, number in enumerate(which.tolist()):
        check_close(together[row], logits(models[number], tokens[row]))


def test_one_row_at_a_time_decodes_with_adapters_of_their_own():
    models = [quantize.int8(adapted(seed=seed)) for seed in range(2)]
    several = lora.stack([lora.split(model)[0] for model in models])
    frozen = lora.split(models[0])[1]
    tokens = tiny.tokens(2, 1)
    run = jax.jit(jax.vmap(lambda a, t: eqx.combine(a, frozen)(t).logits))
    for row, model in enumerate(models):
        check_close(run(several, tokens)[row], logits(model, tokens[row]))


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adapted(where=lambda path, einsum: False), "No projection was chosen"),
        (lambda: lora.add(tiny.model(tiny.GEMMA3), rank=0, key=jax.random.key(0)), "got 0"),
        (
            lambda: lora.add(quantize.int8(tiny.model(tiny.GEMMA3)), rank=1, key=jax.random.key(0)),
            "`Int8Einsum` does not tell the axes",
        ),
        (lambda: lora.stack([]), "give at least one"),
        (
            lambda: lora.stack([lora.split(adapted())[0], lora.split(adapted(kind="dora"))[0]]),
            "number 1 differs from number 0",
        ),
        (
            lambda: lora.transfer(adapted(), eg.prepare(tiny.model(tiny.GEMMA3))),
            "adapters for layers.0.attention.projection.kv, .* `prepare` has joined",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_adapters_of_another_strength_are_not_stacked():
    one = lora.split(adapted())[0]
    path = "layers.0.attention.output"
    other = lora.replace(
        adapted(), lambda name, e: replace(e, scale=2 * e.scale) if name == path else e
    )
    with pytest.raises(ValueError, match="same places, kind, rank and strength"):
        lora.stack([one, lora.split(other)[0]])
