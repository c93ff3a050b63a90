"""Four bits per weight: the numbers of Q4_0, two in a byte, and the model that they are."""

import dataclasses
from typing import Any

import equinox as eqx
import formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hlo import as_users_compile, operations
from quantized import check_close, check_gradient

import equigemma as eg
from equigemma import lora, prepare, quantize
from equigemma.checkpoint import load_model
from equigemma.config import FeedForwardConfig
from equigemma.quantize import GroupwiseEinsum, Int4Groups, Int8Groups
from equigemma.quantize._int4_groups import int4_groups
from equigemma.sampling import Greedy, _request, _stream
from equigemma.sampling._request import validate_and_pad


LENGTH, GROUP = 11, 5


def test_rounding_is_that_of_the_library():
    gguf = pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
    rows = np.random.default_rng(0).normal(size=(31, 5 * 32)).astype(np.float32)
    rows[3, 32:64] = 0.0
    kind = gguf.GGMLQuantizationType.Q4_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    np.testing.assert_array_equal(int4_groups(jnp.asarray(rows), 32).floats(), expected)


def test_two_numbers_are_in_a_byte():
    packed = int4_groups(jnp.asarray([[-8.0, 3.0, 4.0, -2.0, 16.0]]), 2)
    # Groups of −8 3, of 4 −2 and of 16; the largest of each becomes −8.
    assert packed.scale.tolist() == [[1.0, -0.5, -2.0]]
    low, high = [-8, 3, -8, 4], [-8, 0, 0, 0]
    assert packed.weight.tolist() == [
        [16 * above + (below & 15) for below, above in zip(low, high, strict=True)]
    ]
    np.testing.assert_array_equal(packed.floats(), [[-8.0, 3.0, 4.0, -2.0, 16.0]])
    (product,) = packed.matmul_t(jnp.asarray([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert product == -8 + 6 + 12 - 8 + 80


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gemma4 experts"])
def test_it_is_the_model_of_the_rounded_weights(name):
    model = tiny.model(tiny.CONFIGS[name])
    quantized = quantize.int4(model, group_size=GROUP)
    gate = quantized.layers[0].ffw.gate if name == "gemma3" else quantized.layers[0].ffw.dense.gate
    assert isinstance(gate, GroupwiseEinsum) and isinstance(gate.matrices[0], Int4Groups)
    assert isinstance(quantized.embedding.weight, Int8Groups)
    floats = quantize.dequantize(quantized)
    errors = quantize.quantization_error(model, quantized)
    # Steps are 1/8 of the largest of up to 5 numbers.
    assert all(0.03 < error < 0.1 for name, error in errors.items() if name != "embedding")

    tokens = tiny.tokens(2, LENGTH)
    expected = tiny.run(floats, tokens).logits
    check_close(tiny.run(quantized, tokens).logits, expected)
    # One row takes another path than many.
    cache = tiny.empty_cache(quantized.config, capacity=LENGTH)
    output = tiny.run_in_chunks(quantized, tokens[0], (LENGTH - 3, 1, 1, 1), cache=cache)
    check_close(output.logits, expected[0])


@pytest.mark.slow
def test_adapters_learn_over_four_bits():
    adapted = lora.add(tiny.model(tiny.GEMMA3), rank=2, key=jax.random.key(0))
    quantized = quantize.int4(adapted, group_size=GROUP)
    tokens = tiny.tokens(LENGTH)
    check_gradient(quantized, tokens)


def test_bytes_of_a_real_model():
    def build() -> eg.Transformer:
        config = eg.variants.get("gemma3-270m")
        return quantize.int4(eg.Transformer(config, key=jax.random.key(0), dtype=jnp.bfloat16))

    layers = eqx.filter_eval_shape(build).layers
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    # Half a byte for each number, a sixteenth for its part of a scale, and norms in bfloat16.
    matrices = 18 * (1536 * 640 + 640 * 1024 + 3 * 640 * 2048)
    assert size == matrices * 9 // 16 + 2 * 18 * (4 * 640 + 2 * 256)


def test_a_folder_and_back(tmp_path):
    pytest.importorskip("safetensors", reason='needs pip install "equigemma[hf]"')
    model = quantize.int4(formats.model(formats.wide(formats.CONFIGS["gemma3"])))
    eg.save(model, tmp_path / "x", tokenizer=formats.tokenizer())
    found = load_model(tmp_path / "x", dtype="float32")
    assert jax.tree.structure(found) == jax.tree.structure(model)
    formats.assert_same(found, model)
    # What has no words for four bits gets floats.
    eg.save(model, tmp_path / "y", tokenizer=formats.tokenizer(), dtype="float32")
    floats = prepare(load_model(tmp_path / "y", dtype="float32"))
    formats.assert_same(floats, quantize.dequantize(model))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="these are facts about XLA on CPU")
def test_a_step_writes_nothing_of_the_size_of_a_weight():
    layer = tiny.layer(heads=3, kv_heads=1, head_dim=64, qk_norm=True)
    layer = dataclasses.replace(layer, ffw=FeedForwardConfig(hidden_dim=8 * 32))
    config = eg.ModelConfig(vocab=1009, width=6 * 32, layers=(layer,))

    def plain() -> eg.Transformer:
        return eg.Transformer(config, key=jax.random.key(0), dtype=jnp.bfloat16)

    model = eqx.filter_eval_shape(lambda: quantize.int4(plain()))
    request = validate_and_pad(
        model, jnp.arange(3), max_new_tokens=29, stop_tokens=(), cache=None, sampler=Greedy()
    )
    state = jax.eval_shape(_request.start, model, request, Greedy())
    advance: Any = _stream.advance
    step = operations(as_users_compile(advance.lower(model, state, Greedy(), request.stop_tokens)))
    shapes = jax.tree.leaves(eqx.filter_eval_shape(lambda: prepare(plain())))
    sizes = {leaf.size for leaf in shapes if leaf.ndim > 1}
    assert len(step) > 10
    assert [one for one in step if one.size in sizes | {size // 2 for size in sizes}] == []
