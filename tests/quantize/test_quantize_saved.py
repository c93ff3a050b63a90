"""Quantized models as files: the same integers and scales come back."""

import json
from pathlib import Path

import formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny


pytest.importorskip("safetensors", reason='needs pip install "equigemma[hf]"')

import equigemma as eg  # noqa: E402
from equigemma import (  # noqa: E402
    lora,
    prepare,  # noqa: E402
    quantize,
)
from equigemma.checkpoint import CheckpointError, load_config, load_model  # noqa: E402
from equigemma.checkpoint._convert import convert  # noqa: E402
from equigemma.checkpoint.core._plain import as_plain  # noqa: E402


WIDE = {name: formats.wide(config) for name, config in (formats.CONFIGS | formats.NEWER).items()}
FORMS = {"rows": {}, "groups": {"group_size": 32}, "short groups": {"group_size": 5}}


def narrow(name: str, form: str, dtype=jnp.float32) -> eg.Transformer:
    return quantize.int8(formats.model(WIDE[name], dtype), **FORMS[form])


def save(model: eg.Transformer, path: Path, **options) -> Path:
    eg.save(model, path, tokenizer=formats.tokenizer(), **options)
    return path


def assert_same(ours: eg.Transformer, theirs: eg.Transformer) -> None:
    """Bit for bit, also in what is static."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    formats.assert_same(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma1 mha", "gemma3", "gemma4 experts", "gemma3n"])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_and_back(name, form, tmp_path):
    if name == "gemma3n" and form != "rows":
        pytest.skip("25 layers: once is enough")
    model = narrow(name, form)
    path = save(model, tmp_path / "x")
    found, tokenizer = eg.load(path, dtype="float32")
    assert_same(found, model)
    assert tokenizer.encode("hello") == formats.tokenizer().encode("hello")
    assert load_config(path) == model.config
    # A second time it is replaced.
    save(model, path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x"]


def test_another_dtype_of_what_is_not_in_few_bits(tmp_path):
    model = narrow("gemma3", "rows")
    found = load_model(save(model, tmp_path / "x"))
    assert found.dtype == jnp.bfloat16 and found.final_norm.scale.dtype == jnp.bfloat16
    gate, expected = found.layers[1].ffw.gate, model.layers[1].ffw.gate
    np.testing.assert_array_equal(gate.matrices[0], expected.matrices[0])
    np.testing.assert_array_equal(gate.scale, expected.scale)


@pytest.mark.parametrize("name", ["gemma1 mqa", "gemma1 mha", "gemma3", "gemma4 experts"])
def test_a_prepared_model_is_saved_as_the_plain_one(name, tmp_path):
    pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
    model = formats.model(WIDE[name])
    for path in (tmp_path / "x", tmp_path / "x.gguf"):
        found = load_model(save(prepare(model), path), dtype="float32")
        expected = load_model(save(model, path), dtype="float32")
        assert_same(found, expected)


@pytest.mark.parametrize("name", ["gemma1 mha", "gemma3", "gemma4 experts", "gemma4 small"])
def test_groups_become_the_blocks_of_a_gguf(name, tmp_path):
    gguf = pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
    model = formats.model(WIDE[name])
    theirs = save(model, tmp_path / "theirs.gguf", dtype="q8_0")
    ours = save(quantize.int8(model, group_size=32), tmp_path / "ours.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(ours).tensors}
    packed = 0
    for tensor in gguf.GGUFReader(theirs).tensors:
        # A router and the second embedding `int8` leaves alone, and the file of floats packs them.
        if found[tensor.name].tensor_type.name == "Q8_0":
            np.testing.assert_array_equal(found[tensor.name].data, tensor.data)
            packed += 1
    assert packed > 2 * len(model.config.layers)
    loaded = load_model(ours, dtype="float32", quantized=True)
    again = save(loaded, tmp_path / "again.gguf")
    for tensor in gguf.GGUFReader(again).tensors:
        np.testing.assert_array_equal(found[tensor.name].data, tensor.data)


def test_rows_keep_their_integers_in_a_gguf(tmp_path):
    pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
    model = narrow("gemma3", "rows")
    found = load_model(save(model, tmp_path / "x.gguf"), dtype="float32", quantized=True)
    for place in (lambda m: m.layers[1].ffw.down, lambda m: m.layers[1].attention.projection.qkv):
        ours, theirs = place(model), place(found).matrices[0]
        np.testing.assert_array_equal(theirs.weight, ours.matrices[0])
        scale = np.asarray(ours.scale).astype(np.float16)[:, None]
        np.testing.assert_array_equal(theirs.scale, np.broadcast_to(scale, theirs.scale.shape))


def test_floats_where_they_are_asked_for(tmp_path):
    model = narrow("gemma3", "groups")
    path = save(model, tmp_path / "x", format="huggingface", dtype="float32")
    found = prepare(load_model(path, dtype="float32"))
    assert_same(found, quantize.dequantize(model))
    with pytest.raises(CheckpointError, match="has dtype int8; weights are saved as float32, fl"):
        save(model, tmp_path / "y", format="huggingface")


def test_what_is_cut_out_is_what_was_joined():
    model = formats.model(WIDE["gemma1 mha"])
    plain = as_plain(prepare(model))
    for ours, theirs in zip(jax.tree.leaves(plain), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


def test_adapters_are_refused(tmp_path):
    adapted = lora.add(formats.model(WIDE["gemma3"]), rank=2, key=jax.random.key(0))
    with pytest.raises(CheckpointError, match="merge or remove adapters first"):
        save(quantize.int8(adapted), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_folder_cannot_be(tmp_path):
    model = narrow("gemma3", "groups")
    with pytest.raises(CheckpointError, match="as it is; got dtype=float32"):
        save(model, tmp_path / "x", format="equigemma", dtype="float32")
    path = save(model, tmp_path / "x")
    with pytest.raises(CheckpointError, match="load it and save it in another format"):
        convert(path, tmp_path / "y")
    settings = json.loads((path / "equigemma.json").read_text())

    def damaged(changes: dict, message: str) -> None:
        (path / "equigemma.json").write_text(json.dumps(settings | changes))
        with pytest.raises(CheckpointError, match=message):
            load_model(path)

    damaged({"version": 2}, "its version is 2, this release reads 1")
    damaged({"parts": {"embedding": "int7"}}, "has an unknown quantization, 'int7'")
    damaged({"parts": {"embedded": "int8"}}, "there is no matrix at embedded")
    damaged({"parts": {"embedding": 8}}, "parts must be strings")
    damaged({"parts": settings["parts"] | {"embedding": "int8"}}, "difference")
    damaged({"config": None}, "no config")
    (path / "model.safetensors").write_bytes(b"")
    damaged({}, "cut off or damaged")


def test_logits_of_what_came_back(tmp_path):
    model = narrow("gemma4 small", "groups")
    found = load_model(save(model, tmp_path / "x"), dtype="float32")
    tokens = tiny.tokens(5)
    # The same program of the same numbers.
    np.testing.assert_array_equal(tiny.run(found, tokens).logits, tiny.run(model, tokens).logits)
