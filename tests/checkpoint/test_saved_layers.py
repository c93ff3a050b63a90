"""Models of chosen layers as files: the same model when they are read again, or an error."""

import equinox as eqx
import formats
import jax
import pytest
import tiny

import equigemma as eg
from equigemma import checkpoint, quantize
from equigemma.checkpoint import CheckpointError


for _module in ("gguf", "safetensors", "orbax.checkpoint"):
    pytest.importorskip(_module, reason='needs pip install "equigemma[test]"')

CONFIGS = formats.CONFIGS | formats.NEWER

SAVED = [
    # Any pattern of local and global layers, as `layer_types`.
    ("gemma1 mqa", [1, 1, 0], "huggingface"),
    ("gemma2", [1, 0, 0, 2], "huggingface"),
    ("gemma3", [5, 0, 0, 5], "huggingface"),
    ("gemma4 small", [1, 0, 0, 2, 3], "huggingface"),
    ("gemma3n", [*range(10), *range(15, 25)], "huggingface"),
    ("gemma1 mqa", [1, 1, 0], "gguf"),
    ("gemma2", [0, 1, 2, 1], "gguf"),
    ("gemma3", [0, 5, 1, 5], "gguf"),
    ("gemma3", [0, 1], "gguf"),
    ("gemma4 small", [0, 1, 0, 1, 2, 3], "gguf"),
    ("gemma2", [0, 1], "orbax"),
    ("gemma3", [5, 0, 0, 5], "orbax"),
    ("gemma4 small", [1, 0, 0, 2, 3, 2], "orbax"),
]
"""A model, the layers chosen, and a format."""


REFUSED = [
    # `transformers` has the last layer of a Gemma 4 attend to everything.
    ("gemma4 small", [1, 0, 0, 2, 3, 2], "huggingface"),
    # It has one size of feed-forwards for layers with keys of their own, in their order.
    ("gemma4 small", [0, 1, 2, 0, 3], "huggingface"),
    # llama.cpp has every n-th layer attend to everything.
    ("gemma2", [1, 0, 0], "gguf"),
    ("gemma3", [5, 0, 0, 5], "gguf"),
    # As constants it has where shared keys begin, and whose they are.
    ("gemma3n", [*range(10), *range(15, 25)], "gguf"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers", "format"), SAVED)
def test_the_same_model_is_loaded(name, layers, format, tmp_path):
    model = formats.model(CONFIGS[name]).with_layers(layers)
    path = tmp_path / ("x.gguf" if format == "gguf" else "x")
    eg.save(model, path, tokenizer=formats.tokenizer(), format=format)
    loaded = checkpoint.load_model(path, dtype="float32")
    formats.assert_same(loaded, model)
    assert jax.tree.structure(loaded) == jax.tree.structure(model)


@pytest.mark.parametrize(("name", "layers", "format"), REFUSED)
def test_what_a_format_cannot_say_is_refused(name, layers, format, tmp_path):
    model = formats.model(CONFIGS[name]).with_layers(layers)
    path = tmp_path / ("x.gguf" if format == "gguf" else "x")
    with pytest.raises(CheckpointError, match="cannot be saved"):
        eg.save(model, path, tokenizer=formats.tokenizer(), format=format)
    assert not list(tmp_path.iterdir())


def test_in_few_bits(tmp_path):
    model = quantize.int8(formats.model(CONFIGS["gemma3"])).with_layers([5, 0, 0, 5])
    eg.save(model, tmp_path / "x")
    loaded = checkpoint.load_model(tmp_path / "x", dtype="float32")
    formats.assert_same(loaded, model)


def test_parts_of_another_layer_in_few_bits_are_refused(tmp_path):
    # All arrays fit; the number that a Gemma 3n cuts activations off at is no array.
    model = quantize.int8(tiny.model(tiny.GEMMA3N))
    cut, whole = model.layers[0].ffw, model.layers[1].ffw
    wrong = eqx.tree_at(lambda m: (m.layers[0].ffw, m.layers[1].ffw), model, (whole, cut))
    with pytest.raises(CheckpointError, match="layers.0 is not what the model's config describes"):
        eg.save(wrong, tmp_path / "x")
