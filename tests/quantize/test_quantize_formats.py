"""What rounding left of a model, in every format: the numbers that were in memory."""

from dataclasses import replace
from pathlib import Path

import equinox as eqx
import formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import lora, quantize
from equigemma.checkpoint import CheckpointError, load_model
from equigemma.config import ModelConfig
from equigemma.embedding import Embedder


for _module in ("gguf", "safetensors", "orbax.checkpoint"):
    pytest.importorskip(_module, reason='needs pip install "equigemma[test]"')

# Orbax's own writers leave an event loop to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def square(config: ModelConfig) -> ModelConfig:
    """Experts as wide as the model: what is transposed has the right shape."""

    def wide(layer):
        moe = replace(layer.ffw.moe, hidden_dim=config.width)
        return replace(layer, ffw=replace(layer.ffw, moe=moe))

    return replace(config, layers=tuple(map(wide, config.layers)))


EXPERTS = formats.NEWER["gemma4 experts"]
CONFIGS = {
    "experts": EXPERTS,
    "square experts": square(EXPERTS),
    "experts in blocks": square(formats.wide(EXPERTS)),
    "gemma1 mha": formats.CONFIGS["gemma1 mha"],
    "gemma3, untied": replace(formats.wide(formats.CONFIGS["gemma3"]), lm_head="untied"),
    "gemma4 small": formats.NEWER["gemma4 small"],
}
NARROW = {
    "int8": quantize.int8,
    "int8 groups": lambda model: quantize.int8(model, group_size=32),
    "int8 short groups": lambda model: quantize.int8(model, group_size=5),
    "int4": quantize.int4,
    "int4 short groups": lambda model: quantize.int4(model, group_size=3),
}
FORMATS = ("huggingface", "gguf", "orbax")


def save(model: eg.Transformer, folder: Path, format: str, **options) -> Path:
    path = folder / ("x.gguf" if format == "gguf" else "x")
    eg.save(model, path, tokenizer=formats.tokenizer(), format=format, **options)
    return path


def logits(model: eg.Transformer) -> np.ndarray:
    return np.asarray(formats.logits(model, tiny.tokens(2, 7)))


def check(path: Path, expected: np.ndarray) -> eg.Transformer:
    found = load_model(path, dtype="float32")
    # The same numbers, summed in another order; logits reach 20.
    np.testing.assert_allclose(logits(found), expected, rtol=0, atol=1e-4)
    return found


# Of experts all forms, whose layouts differ; of the others each layout once.
CASES = [
    (name, format, form)
    for name in CONFIGS
    for format in FORMATS
    for form in (NARROW if "experts" in name else ("int8", "int4 short groups"))
    # DeepMind's tree has no head.
    if (name, format) != ("gemma3, untied", "orbax")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format", "form"), CASES)
def test_what_was_in_memory_is_what_is_saved(name, format, form, tmp_path):
    model = formats.model(CONFIGS[name])
    narrow = NARROW[form](model)
    expected = logits(narrow)
    assert np.abs(expected - logits(model)).max() > 1e-3
    wide = check(save(quantize.dequantize(narrow), tmp_path, format), expected)
    other = tmp_path / "y"
    other.mkdir()
    direct = check(save(narrow, other, format, dtype="float32"), expected)
    formats.assert_same(wide, direct)


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
def test_formats_without_integers_ask_for_a_dtype(format, tmp_path):
    narrow = quantize.int8(formats.model(formats.wide(EXPERTS)))
    with pytest.raises(CheckpointError, match="has dtype int8; weights are saved as .* dtype="):
        save(narrow, tmp_path, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", NARROW)
@pytest.mark.parametrize("name", ["experts", "square experts"])
def test_experts_come_back_in_their_layout(name, form):
    model = formats.model(CONFIGS[name])
    wide = quantize.dequantize(NARROW[form](model))
    for ours, theirs in zip(wide.layers, model.layers, strict=True):
        for part in ("gate", "down"):
            found, exact = (getattr(layer.ffw.experts, part) for layer in (ours, theirs))
            assert found.eqn == exact.eqn and found.weight.shape == exact.weight.shape
            # A step, of 8 to the largest of a row: Q4_0 has no 8 of the other sign. And what
            # float16 loses of a scale.
            bound = np.abs(exact.weight).max() * (1 / 8 + 2**-10)
            assert np.abs(found.weight - exact.weight).max() <= bound
            assert np.abs(found.weight).max() > 0


def test_experts_in_another_order_are_saved_as_they_are():
    """Whoever turns a weight and its equation together changes no number."""
    from equigemma.checkpoint.core._plain import as_plain

    model = formats.model(CONFIGS["square experts"])
    down = model.layers[0].ffw.experts.down
    turned = replace_weight(down, "...EF,EDF->...ED", jnp.swapaxes(down.weight, 1, 2))
    other = eqx.tree_at(lambda m: m.layers[0].ffw.experts.down, model, turned)
    found = as_plain(other)
    assert found.layers[0].ffw.experts.down.eqn == down.eqn
    np.testing.assert_array_equal(found.layers[0].ffw.experts.down.weight, down.weight)


def replace_weight(einsum, eqn: str, weight: jax.Array):
    import dataclasses

    turned = object.__new__(type(einsum))
    for field in dataclasses.fields(einsum):
        object.__setattr__(turned, field.name, {"eqn": eqn, "weight": weight}[field.name])
    return turned


# Embedders.


def embedder(dtype=jnp.float32) -> Embedder:
    config = formats.wide(formats.CONFIGS["gemma3"])
    layers = tuple(
        replace(layer, attention=replace(layer.attention, mask_kind="bidirectional"))
        for layer in config.layers[:6]
    )
    return Embedder(
        replace(config, layers=layers), (96, 64), key=jax.random.key(0), dtype=jnp.dtype(dtype)
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["prepare", *NARROW])
@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_embedders(form, suffix, tmp_path):
    plain, tokens = embedder(), tiny.tokens(2, 7)
    other = eg.prepare(plain) if form == "prepare" else NARROW[form](plain)
    vectors = eqx.filter_jit(lambda e, t: e(t))
    expected = vectors(other, tokens)
    if form == "prepare":
        # Sums in another order.
        np.testing.assert_allclose(expected, vectors(plain, tokens), rtol=0, atol=2e-6)
    else:
        assert 1e-4 < np.abs(expected - vectors(plain, tokens)).max() < 0.2
        assert set(quantize.quantization_error(plain, other)) > {
            "dense.0",
            "dense.1",
            "model.embedding",
        }
        wide = quantize.dequantize(other)
        np.testing.assert_allclose(vectors(wide, tokens), expected, rtol=0, atol=2e-6)
    for dtype in ("float32", *[None] * (suffix == ".gguf")):
        path = tmp_path / f"x{suffix}"
        eg.save(other, path, tokenizer=formats.tokenizer(), dtype=dtype)
        found, _ = eg.load_embedder(path, dtype="float32")
        # The scales of rows are float32 in memory, and float16, of 11 bits, in a file of blocks.
        atol = 2**-11 if dtype is None and form == "int8" else 2e-6
        np.testing.assert_allclose(vectors(found, tokens), expected, rtol=0, atol=atol)


# What cannot be saved: one sentence, and nothing is written.


def adapted(model: eg.Transformer) -> eg.Transformer:
    return lora.add(model, rank=2, key=jax.random.key(0))


REFUSED = {
    "adapters": (
        adapted,
        "has a LoRAEinsum at layers.0.attention.projection.q, which no file format has a name for: "
        "fold adapters into the weights with lora.merge, or write them alone with peft.save",
    ),
    "adapters in 8 bits": (
        lambda model: quantize.int8(adapted(model)),
        "first at layers.0.attention.projection.q.base.matrices.0; merge or remove adapters first",
    ),
    "kept adapters": (
        lambda model: lora.merge(adapted(model), keep=True),
        "has a MergedEinsum at layers.0.attention.projection.q, which no file format has a name",
    ),
    "a module of the user": (
        lambda model: eqx.tree_at(lambda m: m.final_norm, model, eqx.nn.Identity()),
        "has an Identity at final_norm, where its config has another part",
    ),
    "a layer of the user": (
        lambda model: eqx.tree_at(lambda m: m.layers[1], model, eqx.nn.Identity()),
        "has an Identity at layers.1, where its config has another part",
    ),
    "more rows": (
        lambda model: eqx.tree_at(lambda m: m.embedding.weight, model, jnp.zeros((300, 28))),
        r"embedding.weight has the shape \[300, 28\], and the model's config says \[277, 28\]; ch",
    ),
    "fewer layers": (
        lambda model: eqx.tree_at(lambda m: m.layers, model, model.layers[:3]),
        "The model has 3 layers, and its config 7. Move, drop or repeat",
    ),
    "layers swapped": (
        lambda model: eqx.tree_at(lambda m: m.layers, model, model.layers[::-1]),
        r"Layer 1 has rope=.* and model.config.layers\[1\] says .* with model.with_layers",
    ),
    "half of a model": (
        lambda model: eqx.partition(model, eqx.is_inexact_array)[1],
        "has None at embedding.weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved(name, tmp_path):
    change, message = REFUSED[name]
    model = change(formats.model(formats.CONFIGS["gemma3"]))
    for format in ("huggingface", "gguf", "orbax"):
        if name == "adapters in 8 bits":
            format = "equigemma"
        with pytest.raises(CheckpointError, match=message) as caught:
            save(model, tmp_path, format)
        assert "cannot be saved: " in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_kept_adapters_are_let_go_by_merging_again(tmp_path):
    model = adapted(formats.model(formats.CONFIGS["gemma3"]))
    kept = lora.merge(model, keep=True)
    formats.assert_same(lora.merge(kept), lora.merge(model))
    save(lora.merge(kept), tmp_path, "huggingface")
