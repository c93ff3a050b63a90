"""Eight bits in groups: the numbers of Q8_0, from floats and from files."""

import dataclasses
from typing import Any

import equinox as eqx
import formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hlo import as_users_compile, loop_bodies, operations
from quantized import check_close

import equigemma as eg
from equigemma import quantize
from equigemma._prepare import MatrixEinsum, prepare
from equigemma.checkpoint import CheckpointError, load_model
from equigemma.config import FeedForwardConfig
from equigemma.quantize import GroupwiseEinsum, GroupwiseExperts, _int8_groups
from equigemma.quantize._int8_groups import int8_groups
from equigemma.sampling import Greedy, _generate, _request, _stream
from equigemma.sampling._request import validate_and_pad


LENGTH, GROUP = 11, 5


# --- rounding ----------------------------------------------------------------------------------


def test_rounding_is_that_of_the_library():
    gguf = pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(31, 5 * 32)).astype(np.float32)
    rows[3, 32:64] = 0.0
    rows[7] *= 1e-4  # scales below the smallest normal float16
    rows[11] = np.arange(5 * 32) % 32 * 0.5  # halves: 15.5 is 127 steps
    rows[13, :32] = [63.5, *np.arange(31) + 0.25]  # a scale of 0.5, and quotients x.5
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(rows, kind).reshape(31, 5, 34)
    ours = int8_groups(jnp.asarray(rows), 32)
    np.testing.assert_array_equal(ours.weight, packed[..., 2:].reshape(31, -1).view(np.int8))
    np.testing.assert_array_equal(ours.scale, packed[..., :2].copy().view(np.float16)[..., 0])
    expected = gguf.quants.dequantize(packed.reshape(31, -1), kind)
    np.testing.assert_array_equal(ours.floats(), expected)


def test_a_group_at_the_end_of_a_row_is_shorter():
    ours = int8_groups(jnp.asarray([[1.27, -0.01, 12.7, 6.35, 2.54]]), 2)
    assert ours.weight.tolist() == [[127, -1, 127, 64, 127]]
    np.testing.assert_allclose(ours.scale, [[0.01, 0.1, 0.02]], rtol=1e-3)
    # 1.27 + 0.02 + 3 · 12.7 + 4 · 6.4 - 5 · 2.54, scales in float16.
    (product,) = ours.matmul_t(jnp.asarray([1.0, -2.0, 3.0, 4.0, -5.0]))
    np.testing.assert_allclose(product, 1.27 + 0.02 + 38.1 + 25.6 - 12.7, rtol=1e-3)


def test_a_group_needs_a_number():
    with pytest.raises(ValueError, match="at least one number, got group_size=0"):
        quantize.int8(tiny.model(tiny.GEMMA3), group_size=0)


# --- the model ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gemma4 experts"])
def test_it_is_the_model_of_the_rounded_weights(name, monkeypatch):
    # Wide rows, here those of more than 11 numbers, are cut into pieces.
    monkeypatch.setattr(_int8_groups, "LONGEST_ROW", 11)
    model = tiny.model(tiny.CONFIGS[name])
    quantized = quantize.int8(model, group_size=GROUP)
    joined = quantized.layers[0].attention.projection.qkv
    assert isinstance(joined, GroupwiseEinsum)
    assert [piece.inputs for piece in joined.matrices] == [5, 8]
    floats = quantize.dequantize(quantized)
    assert not any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(floats))
    errors = quantize.quantization_error(model, quantized)
    # Steps are 1/127 of the largest of 3 or 5 numbers: smaller ones than with a scale per row.
    assert len(errors) > 5 and all(0.001 < error < 0.006 for error in errors.values())

    tokens = tiny.tokens(2, LENGTH)
    expected = tiny.run(floats, tokens).logits
    check_close(tiny.run(quantized, tokens).logits, expected)
    # One row takes another path than many.
    cache = tiny.empty_cache(quantized.config, capacity=LENGTH)
    output = tiny.run_in_chunks(quantized, tokens[0], (LENGTH - 5, *[1] * 5), cache=cache)
    check_close(output.logits, expected[0])


def test_again_changes_nothing():
    quantized = quantize.int8(tiny.model(tiny.GEMMA3), group_size=GROUP)
    assert eqx.tree_equal(quantize.int8(quantized, group_size=GROUP), quantized)


def test_bfloat16_activations():
    narrow = jax.tree.map(lambda leaf: tiny.host(leaf, jnp.bfloat16), tiny.model(tiny.GEMMA3))
    quantized = quantize.int8(narrow, group_size=GROUP)
    tokens = tiny.tokens(LENGTH)
    output = tiny.run(quantized, tokens)
    assert output.hidden_states.dtype == jnp.bfloat16
    expected = np.asarray(tiny.run(quantize.dequantize(quantized), tokens).logits)
    error = np.sqrt(np.mean((np.asarray(output.logits) - expected) ** 2))
    # Activations and weights of 8 bits, rounded alike but for the order of sums.
    assert error < 0.02 * np.std(expected)


# --- files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
    return tmp_path_factory.mktemp("groups")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma1 mha", "gemma3", "gemma4 experts", "gemma4 small"])
def test_blocks_of_a_file_are_kept(name, folder):
    path = folder / f"{name}.gguf"
    config = formats.wide((formats.CONFIGS | formats.NEWER)[name])
    eg.save(formats.model(config), path, tokenizer=formats.tokenizer(), dtype="q8_0")
    kept = load_model(path, dtype="float32", quantized=True)
    floats = prepare(load_model(path, dtype="float32"))
    narrow = [leaf for leaf in jax.tree.leaves(kept) if leaf.dtype == jnp.int8]
    assert sum(leaf.size for leaf in narrow) > 0.5 * sum(
        leaf.size for leaf in jax.tree.leaves(kept)
    )
    # The reader of floats is compared with the library of the format elsewhere.
    widened = quantize.dequantize(kept)
    for part in (floats, widened):
        assert not any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(part))
    tokens = tiny.tokens(2, LENGTH)
    expected = tiny.run(floats, tokens).logits
    # Without norms behind them, sums of 64 to 112 products come to ten times the usual units.
    np.testing.assert_allclose(tiny.run(kept, tokens).logits, expected, rtol=0, atol=1e-4)
    if "experts" in name:
        assert isinstance(kept.layers[0].ffw.experts.down, GroupwiseExperts)
        return
    for exact, found in zip(jax.tree.leaves(floats), jax.tree.leaves(widened), strict=True):
        np.testing.assert_array_equal(found, exact)


def test_the_integers_are_those_of_the_file(folder):
    gguf = pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
    path = folder / "x.gguf"
    model = formats.model(formats.wide(formats.CONFIGS["gemma3"]))
    eg.save(model, path, tokenizer=formats.tokenizer(), dtype="q8_0")
    told = []
    kept, _ = eg.load(path, quantized=True, on_shapes=lambda shapes, _: told.append(shapes))
    assert jax.tree.structure(told[0]) == jax.tree.structure(kept)
    for shape, leaf in zip(*map(jax.tree.leaves, (told[0], kept)), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
    assert kept.dtype == jnp.bfloat16 and kept.final_norm.scale.dtype == jnp.bfloat16
    data = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    layer = kept.layers[1]
    for names, part in (
        (["token_embd"], kept.embedding.weight),
        (["blk.1.attn_q", "blk.1.attn_k", "blk.1.attn_v"], layer.attention.projection.qkv),
        (["blk.1.ffn_gate", "blk.1.ffn_up"], layer.ffw.gate),
        (["blk.1.ffn_down"], layer.ffw.down),
    ):
        held = part.matrices[0] if isinstance(part, GroupwiseEinsum) else part
        packed = np.concatenate([data[f"{name}.weight"] for name in names])
        blocks = packed.reshape(len(packed), -1, 34)
        scales = blocks[..., :2].copy().view(np.float16)[..., 0]
        np.testing.assert_array_equal(held.scale, scales)
        np.testing.assert_array_equal(
            held.weight, blocks[..., 2:].reshape(len(packed), -1).view(np.int8)
        )
    # What is made of the floats of such a file is the same again.
    again = quantize.int8(load_model(path, dtype="float32"), group_size=32)
    np.testing.assert_array_equal(again.layers[1].ffw.down.matrices[0].weight, held.weight)


def test_a_file_in_part(folder):
    path = folder / "part.gguf"
    config = formats.wide(formats.CONFIGS["gemma3"])
    config = dataclasses.replace(
        config,
        layers=tuple(
            dataclasses.replace(one, ffw=FeedForwardConfig(hidden_dim=17))
            for one in config.layers[:1]
        ),
    )
    eg.save(formats.model(config), path, tokenizer=formats.tokenizer(), dtype="q8_0")
    kept = load_model(path, dtype="float32", quantized=True)
    # Rows of 17 numbers are no whole blocks.
    assert isinstance(kept.layers[0].ffw.down, MatrixEinsum)
    assert isinstance(kept.layers[0].ffw.gate, GroupwiseEinsum)


def test_a_file_without_blocks(folder):
    path = folder / "floats.gguf"
    eg.save(formats.model(formats.CONFIGS["gemma3"]), path, tokenizer=formats.tokenizer())
    with pytest.raises(CheckpointError, match="keeps the 8-bit blocks .* here are none"):
        load_model(path, quantized=True)


# --- programs ----------------------------------------------------------------------------------

HIDDEN, CAPACITY = 7 * 32, 512
# One layer of whole groups, and another size of everything.
CONFIG = eg.ModelConfig(
    vocab=1009,
    width=5 * 32,
    layers=(
        dataclasses.replace(
            tiny.layer(heads=3, kv_heads=1, head_dim=64, qk_norm=True),
            ffw=FeedForwardConfig(hidden_dim=HIDDEN),
        ),
    ),
)


def of_a_size_of_weights(program, form) -> list:
    shapes = eqx.filter_eval_shape(prepare, eqx.filter_eval_shape(form, jnp.float32))
    sizes = {leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1}
    return [one for one in operations(program) if one.size in sizes]


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="these are facts about XLA on CPU")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_decoding_writes_nothing_of_the_size_of_a_weight(dtype):
    def plain(dtype=dtype) -> eg.Transformer:
        return eg.Transformer(CONFIG, key=jax.random.key(0), dtype=dtype)

    model = eqx.filter_eval_shape(lambda: quantize.int8(plain(), group_size=32))
    request = validate_and_pad(
        model,
        jnp.arange(3),
        max_new_tokens=CAPACITY - 3,
        stop_tokens=(),
        cache=None,
        sampler=Greedy(),
    )
    state = jax.eval_shape(_request.start, model, request, Greedy())
    advance: Any = _stream.advance
    run: Any = _generate._run
    step = as_users_compile(advance.lower(model, state, Greedy(), request.stop_tokens))
    assert len(operations(step)) > 10
    assert of_a_size_of_weights(step, plain) == []
    # In a whole answer only chunks of a prompt make floats of weights, one at a time.
    limit = jnp.asarray(1, jnp.int32)
    whole = as_users_compile(run.lower(model, request, Greedy(), limit))
    decoding = {
        one.computation
        for one in operations(whole)
        if one.size == CONFIG.vocab and one.computation in loop_bodies(whole)
    }
    assert len(decoding) == 1
    made = {one.computation for one in of_a_size_of_weights(whole, plain)}
    assert made <= loop_bodies(whole) - decoding
