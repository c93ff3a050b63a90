"""Eight bits per weight: what rounding does, and that nothing else happens."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from quantized import check_close, check_gradient

import equigemma as eg
from equigemma import lora, quantize
from equigemma._prepare import MatrixEinsum, prepare
from equigemma.quantize import Int8Einsum, Int8Embedding, Int8Experts


LENGTH = 11


@pytest.fixture(scope="module", params=["gemma1 mha", "gemma3", "gemma4 experts"])
def models(request) -> tuple[eg.Transformer, eg.Transformer]:
    model = tiny.model(tiny.CONFIGS[request.param])
    return model, quantize.int8(model)


@pytest.fixture(scope="module")
def gemma3() -> tuple[eg.Transformer, eg.Transformer]:
    model = tiny.model(tiny.GEMMA3)
    return model, quantize.int8(model)


def einsum_of(matrix) -> MatrixEinsum:
    rows = jnp.asarray(matrix, jnp.float32)
    return MatrixEinsum(matrices=(rows,), eqn="...D,FD->...F", shape=(len(rows),))


def int8_of(part: MatrixEinsum) -> Int8Einsum:
    """`quantize.int8` of a model in which this part takes the place of a projection."""
    model = tiny.model(tiny.GEMMA1_MQA)

    def place(model):
        return model.layers[0].ffw.down

    return place(quantize.int8(eqx.tree_at(place, model, part)))


# --- rounding ----------------------------------------------------------------------------------


def test_by_hand():
    quantized = int8_of(einsum_of([[0.0, 25.4, -12.65, 0.09], [-1.0, 0.5, 0.25, 1.0]]))
    assert quantized.matrices[0].tolist() == [[0, 127, -63, 0], [-127, 64, 32, 127]]
    np.testing.assert_allclose(quantized.scale, [0.2, 1 / 127], rtol=1e-6)
    # 127 · 0.2 · 1 − 63 · 0.2 · 2 and (64 · 1 + 32 · 2) / 127.
    product = quantized(jnp.asarray([0.0, 1.0, 2.0, 0.0]))
    np.testing.assert_allclose(product, [0.2, 128 / 127], rtol=1e-4)


def test_no_number_is_off_by_more_than_half_a_step(models):
    plain, quantized = models
    before, after = prepare(plain), quantize.dequantize(quantized)
    for exact, rounded in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        exact, rounded = reference.wide(exact), reference.wide(rounded)
        if exact.ndim == 2:
            step = np.abs(exact).max(axis=1, keepdims=True) / 127
            assert (np.abs(rounded - exact) <= 0.5001 * step).all()


def test_a_row_of_zeros():
    quantized = int8_of(einsum_of([[0.0, 0.0], [0.0, 3.0]]))
    assert quantized(jnp.asarray([1.0, 1.0])).tolist() == [0.0, 3.0]


def test_errors(gemma3):
    plain, quantized = gemma3
    errors = quantize.quantization_error(plain, quantized)
    places = [f"layers.{index}." for index in range(2)]
    parts = ["attention.projection.qkv", "attention.output", "ffw.gate", "ffw.down"]
    assert set(errors) == {"embedding", *(place + part for place in places for part in parts)}
    exact = reference.wide(prepare(plain).layers[1].ffw.down.matrices[0])
    rounded = reference.wide(quantized.layers[1].ffw.down.matrices[0])
    rounded *= reference.wide(quantized.layers[1].ffw.down.scale)[:, None]
    expected = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    np.testing.assert_allclose(errors["layers.1.ffw.down"], expected, rtol=1e-4)
    # A step is 1/127 of the largest of 13 to 60 normal numbers, the error of one is 0.29 steps.
    assert all(0.003 < error < 0.007 for error in errors.values())


# --- the model ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_the_model_of_the_rounded_weights(models):
    _, quantized = models
    floats = quantize.dequantize(quantized)
    tokens = tiny.tokens(2, LENGTH)
    expected = tiny.run(floats, tokens).logits
    check_close(tiny.run(quantized, tokens).logits, expected)

    # One row takes another path than many.
    cache = tiny.empty_cache(quantized.config, capacity=LENGTH)
    output = tiny.run_in_chunks(quantized, tokens[0], (LENGTH - 7, *[1] * 7), cache=cache)
    check_close(output.logits, expected[0])


def test_what_is_in_eight_bits(models):
    _, quantized = models
    assert isinstance(quantized.embedding, Int8Embedding)
    left = jax.tree.leaves(quantized, is_leaf=lambda part: isinstance(part, MatrixEinsum))
    routers = [part.eqn for part in left if isinstance(part, MatrixEinsum)]
    assert all(eqn.endswith("E") for eqn in routers)
    mixtures = [layer.ffw for layer in quantized.layers if hasattr(layer.ffw, "router")]
    assert len(routers) == len(mixtures)
    for mixture in mixtures:
        for part in (mixture.experts.gate, mixture.experts.down):
            assert isinstance(part, Int8Experts) and part.weight.dtype == jnp.int8


def test_errors_of_experts():
    model = tiny.model(tiny.GEMMA4_MOE)
    quantized = quantize.int8(model)
    errors = quantize.quantization_error(model, quantized)
    down = quantized.layers[0].ffw.experts.down
    exact = reference.wide(model.layers[0].ffw.experts.down.weight)  # E F D
    rounded = reference.wide(down.weight) * reference.wide(down.scale)[..., None]  # E D F
    expected = np.linalg.norm(rounded.swapaxes(1, 2) - exact) / np.linalg.norm(exact)
    np.testing.assert_allclose(errors["layers.0.ffw.experts.down"], expected, rtol=1e-4)
    # Rows of 5 numbers: the largest is nearer, and so is the step smaller than in wider ones.
    assert 0.001 < expected < 0.007


@pytest.mark.slow
def test_adapters_learn_over_experts_in_eight_bits():
    adapted = lora.add(
        tiny.model(tiny.GEMMA4_MOE),
        rank=2,
        key=jax.random.key(0),
        where=lambda path, _: "experts" in path,
    )
    quantized = quantize.int8(adapted)
    assert isinstance(quantized.layers[0].ffw.experts.down.base, Int8Experts)
    tokens = tiny.tokens(LENGTH)
    plain = tiny.run(quantize.int8(tiny.model(tiny.GEMMA4_MOE)), tokens).logits
    # A new adapter changes nothing.
    check_close(tiny.run(quantized, tokens).logits, plain)
    check_gradient(quantized, tokens)


def test_again_changes_nothing(gemma3):
    _, quantized = gemma3
    assert eqx.tree_equal(quantize.int8(quantized), quantized)


def test_shapes_and_bytes_of_a_real_model():
    def build() -> eg.Transformer:
        config = eg.variants.get("gemma3-270m")
        return quantize.int8(eg.Transformer(config, key=jax.random.key(0), dtype=jnp.bfloat16))

    shapes = eqx.filter_eval_shape(build)
    assert shapes.dtype == jnp.bfloat16
    # A byte for each number of a matrix, 4 for each of its rows, and norms in bfloat16.
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert size == 268_042_240 + 4 * 386_560 + 2 * 55_936


def test_bfloat16_activations(gemma3):
    narrow = jax.tree.map(lambda leaf: tiny.host(leaf, jnp.bfloat16), gemma3[0])
    quantized = quantize.int8(narrow)
    assert quantized.dtype == jnp.bfloat16
    tokens = tiny.tokens(LENGTH)
    output = tiny.run(quantized, tokens)
    assert output.hidden_states.dtype == jnp.bfloat16
    expected, _ = reference.forward(narrow, tokens)
    error = np.sqrt(np.mean((reference.wide(output.logits) - expected) ** 2))
    # Half a per cent of each weight, and activations of 8 bits: a few per cent of the logits.
    assert error < 0.1 * np.std(expected)


def test_saved_and_loaded(gemma3):
    plain, quantized = gemma3
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, quantized)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, eqx.filter_eval_shape(quantize.int8, plain))
    assert eqx.tree_equal(loaded, quantized)


def test_gradients_pass_through_what_is_frozen(gemma3):
    _, quantized = gemma3
    tokens = tiny.tokens(LENGTH)

    def norms(model):
        return [layer.pre_ffw_norm.scale for layer in model.layers]

    @jax.jit
    @jax.grad
    def gradient(scales, model):
        model = eqx.tree_at(norms, model, scales)
        return jax.nn.logsumexp(model(tokens).logits)

    scales = norms(quantized)
    result = gradient(scales, quantized)
    expected = gradient(scales, quantize.dequantize(quantized))
    assert max(np.abs(one).max() for one in expected) > 0.01
    jax.tree.map(check_close, result, expected)
