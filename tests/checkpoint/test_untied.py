"""Models with an output projection of their own, through everything that makes logits."""

import json
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
from equigemma import describe, linen, lora, nn, parameter_counts, quantize, train
from equigemma.checkpoint import CheckpointError, load_config, load_model
from equigemma.checkpoint._convert import convert
from equigemma.config import ModelConfig


safetensors_numpy = pytest.importorskip(
    "safetensors.numpy", reason='needs pip install "equigemma[hf]"'
)


def untied(config: ModelConfig) -> ModelConfig:
    return replace(config, lm_head="untied")


# The model.


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_logits_are_those_of_the_head(name):
    model, tokens = tiny.model(untied(tiny.CONFIGS[name])), tiny.tokens(2, 7)
    output = tiny.run(model, tokens)
    logits = np.asarray(output.hidden_states, np.float64) @ np.asarray(model.lm_head.weight).T
    cap = model.config.final_softcap
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    # A sum of 13 products in float32.
    np.testing.assert_allclose(output.logits, logits, rtol=0, atol=1e-5)
    other = eqx.tree_at(lambda m: m.lm_head.weight, model, -model.lm_head.weight)
    again = tiny.run(other, tokens)
    np.testing.assert_array_equal(again.hidden_states, output.hidden_states)
    np.testing.assert_array_equal(again.logits, -output.logits)


def test_fresh_weights():
    config = untied(tiny.GEMMA3)
    model = eg.Transformer(config, key=jax.random.key(0), dtype=jnp.bfloat16)
    plain = eg.Transformer(tiny.GEMMA3, key=jax.random.key(0), dtype=jnp.bfloat16)
    assert plain.lm_head is None and plain.output_embedding is plain.embedding
    assert model.output_embedding is model.lm_head
    assert model.lm_head.weight.shape == (tiny.VOCAB, tiny.WIDTH)
    assert model.lm_head.weight.dtype == jnp.bfloat16
    # All else is drawn as before.
    np.testing.assert_array_equal(model.embedding.weight, plain.embedding.weight)
    assert not np.array_equal(model.embedding.weight, model.lm_head.weight)


def test_what_is_said_of_it():
    plain, own = describe(tiny.GEMMA3), describe(untied(tiny.GEMMA3))
    assert "output projection" not in plain
    assert own.splitlines()[0].endswith(" parameters, an output projection of its own")
    counts = parameter_counts(untied(tiny.GEMMA3))
    assert counts["output projection"] == tiny.VOCAB * tiny.WIDTH == counts["embedding"]
    assert counts["total"] == parameter_counts(tiny.GEMMA3)["total"] + tiny.VOCAB * tiny.WIDTH


@pytest.mark.slow
def test_prepared_and_stacked():
    config = replace(tiny.GEMMA3, layers=tiny.GEMMA3.layers * 2)
    model, tokens = tiny.model(untied(config)), tiny.tokens(2, 7)
    expected = tiny.run(model, tokens).logits
    for other in (eg.prepare(model), eg.stack(model)):
        # Sums in another order.
        np.testing.assert_allclose(tiny.run(other, tokens).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_generation_and_beams_follow_the_head():
    model = tiny.model(untied(tiny.GEMMA3))
    prompt = tiny.tokens(5)
    greedy = eg.sampling.generate(model, prompt, max_new_tokens=6, stop_tokens=()).tokens
    row = np.asarray(prompt)
    for token in np.asarray(greedy):
        logits = tiny.run(model, tiny.host(row, np.int32)).logits[-1]
        assert int(token) == int(np.argmax(logits))
        row = np.append(row, token)
    beams = eg.sampling.beam_search(model, prompt, num_beams=1, max_new_tokens=6, stop_tokens=())
    np.testing.assert_array_equal(np.asarray(beams.tokens)[0], greedy)


# Training.


@pytest.fixture
def promotion():
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        yield


def batch() -> train.Batch:
    rng = np.random.default_rng(0)
    texts = [train.Example(rng.integers(0, tiny.VOCAB, n), np.ones(n)) for n in (9, 4, 11)]
    return next(train.pack(texts, length=13, rows=2))


def all_at_once(model: eg.Transformer, data: train.Batch):
    """The loss without chunks, by the logits of the model itself."""
    hidden, _ = model.trunk(data.tokens, positions=data.positions, segments=data.segments)
    log_p = jax.nn.log_softmax(model.unembed(hidden))
    chosen = jnp.take_along_axis(log_p, data.targets[..., None], -1)[..., 0]
    return -jnp.sum(chosen * data.weights)


def chunked(model: eg.Transformer, data: train.Batch):
    return train.next_token_loss(model, data, chunk=5)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma1 mqa", "gemma2", "gemma3n", "gemma4 experts"])
def test_gradients_are_those_of_the_logits(name):
    model, data = tiny.model(untied(tiny.CONFIGS[name])), batch()
    value, grads = eqx.filter_jit(eqx.filter_value_and_grad(chunked))(model, data)
    expected, expected_grads = eqx.filter_jit(eqx.filter_value_and_grad(all_at_once))(model, data)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.abs(expected_grads.lm_head.weight).max() > 0.1
    for ours, reference in zip(
        jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        # Sums of some tens of terms, in another order.
        scale = np.abs(reference).max()
        np.testing.assert_allclose(ours, reference, rtol=0, atol=2e-5 * max(scale, 1))


def test_only_the_head_learns(promotion):
    import optax

    model = tiny.model(untied(tiny.GEMMA3))
    chosen = jax.tree.map(lambda _: False, model)
    chosen = eqx.tree_at(lambda m: m.lm_head.weight, chosen, True)
    optimizer = optax.sgd(0.01)
    state = train.init(model, optimizer, trainable=chosen)
    step = train.make_step(train.next_token_loss, optimizer)
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01
    learned = train.merge(state)
    np.testing.assert_array_equal(learned.embedding.weight, model.embedding.weight)
    assert not np.array_equal(learned.lm_head.weight, model.lm_head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, {"group_size": 8}], ids=["rows", "groups"])
def test_adapters_learn_under_an_8_bit_head(form):
    adapted = lora.add(tiny.model(untied(tiny.GEMMA3)), rank=2, key=jax.random.key(0))
    model = quantize.int8(adapted, **form)
    floats = quantize.dequantize(model)

    def grad(model):
        learned, frozen = lora.split(model)
        loss = jax.jit(jax.grad(lambda learned: chunked(eqx.combine(learned, frozen), batch())))
        return loss(learned)

    grads, expected = grad(model), grad(floats)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 0.01
    for ours, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        # The same numbers as integers times scales, summed in another order.
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-4)


# Few bits.

NARROW = {
    "int8": quantize.int8,
    "int8 groups": lambda model: quantize.int8(model, group_size=8),
    "int4": lambda model: quantize.int4(model, group_size=8),
}


@pytest.mark.parametrize("form", NARROW)
def test_the_head_is_rounded_too(form):
    model, tokens = tiny.model(untied(tiny.GEMMA3)), tiny.tokens(2, 7)
    narrow = NARROW[form](model)
    assert isinstance(narrow.lm_head, quantize.Int8Embedding | quantize.GroupwiseEmbedding)
    assert 0 < quantize.quantization_error(model, narrow)["lm_head"] < 0.01
    wide = quantize.dequantize(narrow)
    assert isinstance(wide.lm_head, nn.Embedding)
    # Half a step is 1/254 of the largest number of a row; a scale in float16 has 11 bits.
    bound = np.abs(model.lm_head.weight).max(axis=1, keepdims=True) * (1 / 254 + 2**-11)
    assert (np.abs(wide.lm_head.weight - model.lm_head.weight) <= bound).all()
    np.testing.assert_allclose(
        tiny.run(narrow, tokens).logits, tiny.run(wide, tokens).logits, rtol=0, atol=5e-5
    )


# Files.

MODELS = {
    name: untied(config)
    for name, config in (formats.CONFIGS | formats.NEWER).items()
    if name not in ("gemma1 mha", "gemma3n")
}
MODELS |= {"gemma3n": untied(formats.gemma3n(5)), "seeing": untied(formats.SEEING["3 averaged"])}


def save(model: eg.Transformer, path: Path, **options) -> Path:
    images = model.config.vision is not None
    eg.save(model, path, tokenizer=formats.tokenizer(images=images), **options)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_folders(name, tmp_path):
    model = formats.model(MODELS[name])
    path = save(model, tmp_path / "x")
    data = json.loads((path / "config.json").read_text())
    assert data["tie_word_embeddings"] is False
    assert data.get("text_config", data)["tie_word_embeddings"] is False
    formats.assert_same(load_model(path, dtype="float32"), model)
    assert load_config(path) == model.config
    again = tmp_path / "y"
    convert(path, again)
    formats.assert_same(load_model(again, dtype="float32"), model)


@pytest.mark.parametrize("name", ["gemma3", "gemma3n", "gemma4 small", "gemma4 experts", "seeing"])
@pytest.mark.parametrize("dtype", [None, "q8_0"])
def test_files_of_llama_cpp(name, dtype, tmp_path):
    pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
    config = MODELS[name]
    if dtype is not None:
        config = replace(formats.wide(config), vision=None) if name != "seeing" else config
    model = formats.model(config)
    path = save(model, tmp_path / "x.gguf", dtype=dtype)
    found = load_model(path, dtype="float32")
    assert found.config.lm_head == "untied" and load_config(path).lm_head == "untied"
    # Half a step of 127 to the largest of 32 numbers; rows of 28 are not packed.
    atol = 0 if dtype is None or name == "seeing" else np.abs(model.lm_head.weight).max() / 250
    np.testing.assert_allclose(found.lm_head.weight, model.lm_head.weight, rtol=0, atol=atol)
    convert(path, tmp_path / "y")
    again = load_model(tmp_path / "y", dtype="float32")
    np.testing.assert_array_equal(again.lm_head.weight, found.lm_head.weight)


def test_blocks_of_a_head_are_kept(tmp_path):
    pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
    model = formats.model(formats.wide(MODELS["gemma3"]))
    path = save(model, tmp_path / "x.gguf", dtype="q8_0")
    found = load_model(path, dtype="float32", quantized=True)
    assert isinstance(found.lm_head, quantize.GroupwiseEmbedding)
    expected = quantize.int8(model, group_size=32).lm_head
    np.testing.assert_array_equal(found.lm_head.weight.weight, expected.weight.weight)
    np.testing.assert_array_equal(found.lm_head.weight.scale, expected.weight.scale)
    again = save(found, tmp_path / "y.gguf")
    formats.assert_same(load_model(again, dtype="float32"), load_model(path, dtype="float32"))


@pytest.mark.parametrize("form", NARROW)
def test_folders_of_few_bits(form, tmp_path):
    model = NARROW[form](formats.model(MODELS["gemma3"]))
    found = load_model(save(model, tmp_path / "x"), dtype="bfloat16")
    assert found.lm_head.dtype == found.embedding.dtype == jnp.bfloat16
    for ours, theirs in zip(
        jax.tree.leaves(found.lm_head), jax.tree.leaves(model.lm_head), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_formats_without_a_place_for_it(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason='needs pip install "equigemma[orbax]"')
    pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
    model = formats.model(MODELS["gemma2"])
    for format in ("orbax", "orbax-flat"):
        with pytest.raises(CheckpointError, match="have no place for this model's lm_head"):
            save(model, tmp_path / "x", format=format)
    for name in ("gemma1 mqa", "gemma2"):
        with pytest.raises(CheckpointError, match=f"architecture {name[:6].rstrip('1')} the embed"):
            save(formats.model(MODELS[name]), tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="have no place for this model's lm_head"):
        linen.to_variables(model)
    assert list(tmp_path.iterdir()) == []


# What a folder holds besides, or does not hold.


def rewrite(folder: Path, change, **config) -> Path:
    """A folder whose tensors `change` got hold of."""
    tensors = safetensors_numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors_numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


GEMMA3 = formats.CONFIGS["gemma3"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(formats.model(GEMMA3), tmp_path / "x")


def test_a_tied_head_that_differs_is_used(folder):
    head = np.random.default_rng(9).normal(size=(formats.VOCAB, formats.WIDTH)).astype(np.float32)
    rewrite(folder, lambda tensors: tensors.update({HEAD: head}))
    found = load_model(folder, dtype="float32")
    assert found.config == untied(GEMMA3) == load_config(folder)
    np.testing.assert_array_equal(found.lm_head.weight, head)
    np.testing.assert_array_equal(found.embedding.weight, formats.model(GEMMA3).embedding.weight)


@pytest.mark.parametrize("row", [0, formats.VOCAB - 1])
def test_one_number_makes_it_another_head(row, folder, monkeypatch):
    from equigemma.checkpoint.core import _safetensors as _hf_tensors

    # Several pieces: none of them may be forgotten.
    monkeypatch.setattr(_hf_tensors, "_PIECE", 3 * formats.WIDTH)

    def change(tensors):
        tensors[HEAD] = tensors[EMBEDDING].copy()
        tensors[HEAD][row, -1] += 1

    rewrite(folder, change)
    assert load_config(folder).lm_head == "untied"


def test_a_tied_head_that_is_the_embedding_is_left_out(folder):
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].copy()}))
    formats.assert_same(load_model(folder, dtype="float32"), formats.model(GEMMA3))


def test_a_head_that_is_said_to_be_untied_stays_so(folder):
    rewrite(
        folder,
        lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].copy()}),
        tie_word_embeddings=False,
    )
    found = load_model(folder, dtype="float32")
    np.testing.assert_array_equal(found.lm_head.weight, found.embedding.weight)


def test_a_tied_head_stands_for_the_embedding(folder):
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    formats.assert_same(load_model(folder, dtype="float32"), formats.model(GEMMA3))


def test_no_head_where_there_should_be_one(folder):
    rewrite(folder, lambda tensors: None, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="says tie_word_embeddings: false, and there is no"):
        load_model(folder)


def test_no_embedding_where_there_should_be_one(folder):
    rewrite(
        folder,
        lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}),
        tie_word_embeddings=False,
    )
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: missing"):
        load_model(folder)


def test_a_head_of_another_size(folder):
    rewrite(folder, lambda tensors: tensors.update({HEAD: np.ones((3, 2), np.float32)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected shape \[277, 28\], got"):
        load_model(folder)


def test_a_head_in_another_dtype(folder):
    def change(tensors):
        tensors[EMBEDDING] = tensors[EMBEDDING].astype(jnp.bfloat16)
        tensors[HEAD] = tensors[EMBEDDING].astype(np.float32)

    rewrite(folder, change)
    assert load_model(folder, dtype="float32").lm_head is None


@pytest.mark.parametrize("lists", ["embedding", "nothing"])
def test_an_index_that_lists_a_tied_head(lists, tmp_path):
    model = formats.model(GEMMA3)
    path = save(model, tmp_path / "x", shard_bytes=10_000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    first = index["weight_map"][EMBEDDING]
    index["weight_map"][HEAD] = first
    if lists == "nothing":
        del index["weight_map"][EMBEDDING]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    formats.assert_same(load_model(path, dtype="float32"), model)
