"""Checkpoints from every format to every other: nothing is lost that the dtype can hold."""

import json
from dataclasses import replace
from pathlib import Path

import formats
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma.checkpoint import CheckpointError, _write, load_chat_template, load_model
from equigemma.checkpoint._convert import convert
from equigemma.checkpoint.core._layout import official_layout, relayout
from equigemma.config import ModelConfig
from equigemma.tokenizers import SentencePieceTokenizer


for _module in ("gguf", "safetensors", "tokenizers", "orbax.checkpoint"):
    pytest.importorskip(_module, reason='needs pip install "equigemma[test]"')

# Orbax's own writers leave an event loop to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

HALVES = (jnp.bfloat16, jnp.float16)
FORMATS = ("huggingface", "gguf", "orbax", "orbax-flat")
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"


def place(folder: Path, format: str, name: str = "x") -> Path:
    return folder / (f"{name}.gguf" if format == "gguf" else name)


def save(model: eg.Transformer, folder: Path, format: str, name: str = "x", **options) -> Path:
    """A checkpoint as `eg.save` writes it."""
    path = place(folder, format, name)
    eg.save(model, path, tokenizer=formats.tokenizer(), format=format, **options)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_format_to_every_other(source, target, tmp_path):
    model = formats.model(formats.CONFIGS["gemma2"])
    first = save(model, tmp_path, source)
    second = place(tmp_path, target, "y")
    convert(first, second, format=target)
    found, tokenizer = eg.load(second, dtype="float32")
    formats.assert_same(model, found)
    text = "hello <table> é\n"
    assert tokenizer.encode(text) == formats.tokenizer().encode(text)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, jnp.float32) for name in formats.CONFIGS), *(("gemma2", t) for t in HALVES)],
)
def test_once_round_through_all_formats(name, dtype, tmp_path):
    model = formats.model(formats.CONFIGS[name], dtype)
    path = save(model, tmp_path, "huggingface", "0")
    for step, target in enumerate(("gguf", "orbax", "orbax-flat", "huggingface"), 1):
        after = place(tmp_path, target, str(step))
        convert(path, after, format=target)
        path = after
    formats.assert_same(model, load_model(path, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3n", "gemma4 small", "gemma4 experts"])
def test_newer_generations_through_folders(name, tmp_path):
    config = replace(formats.in_files(name), vocab=formats.VOCAB)
    model = tiny.model(config)
    eg.save(model, tmp_path / "0")
    flat = "orbax" if name == "gemma4 experts" else "orbax-flat"
    for step, target in enumerate(("orbax", flat, "huggingface"), 1):
        convert(tmp_path / str(step - 1), tmp_path / str(step), format=target)
    formats.assert_same(
        load_model(tmp_path / "0", dtype="float32"), load_model(tmp_path / "3", dtype="float32")
    )
    found = load_model(tmp_path / "1", dtype="float32")
    tokens = tiny.tokens(2, 7)
    # The same numbers, summed by a program of another layout.
    np.testing.assert_allclose(
        tiny.run(found, tokens).logits, tiny.run(model, tokens).logits, atol=2e-5
    )


def test_experts_have_no_names_in_the_older_layout(tmp_path):
    with pytest.raises(CheckpointError, match="no names for experts; take the format 'orbax'"):
        eg.save(tiny.model(formats.in_files("gemma4 experts")), tmp_path / "x", format="orbax-flat")


WIDE = replace(
    formats.CONFIGS["gemma3"],
    width=64,
    layers=tuple(
        replace(layer, ffw=replace(layer.ffw, hidden_dim=96))
        for layer in formats.CONFIGS["gemma3"].layers[:3]
    ),
)
"""Rows in whole blocks of 32 numbers, but for those of the output projection, 4 heads of 10."""


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(WIDE, "float32"), (WIDE, "float16"), (WIDE, "bfloat16"), (WIDE, "q8_0")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gguf_holds_what_its_library_makes_of_the_numbers(model, dtype, tmp_path):
    import gguf
    from gguf.quants import dequantize, quantize

    ours = formats.model(model)
    path = tmp_path / "x.gguf"
    convert(save(ours, tmp_path, "huggingface"), path, dtype=dtype)
    reader = gguf.GGUFReader(path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    exact = safetensors(tmp_path / "x")
    named = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType[named]
        array = exact[tensor.name]
        is_plain = array.ndim == 1 or dtype == "q8_0" and array.shape[-1] % 32
        assert kinds[tensor.name] == ("F32" if is_plain else named)
        expected = array if is_plain else dequantize(quantize(array, kind), kind)
        found = dequantize(tensor.data, tensor.tensor_type).reshape(array.shape)
        np.testing.assert_array_equal(found, expected)
    # What is packed already is unpacked exactly, so that a second time loses nothing.
    convert(path, tmp_path / "y", dtype="float32")
    again = safetensors(tmp_path / "y")
    for tensor in reader.tensors:
        unpacked = dequantize(tensor.data, tensor.tensor_type).reshape(exact[tensor.name].shape)
        np.testing.assert_array_equal(again[tensor.name], unpacked)


def safetensors(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a folder under the names of llama.cpp, norms larger by 1 as it has them."""
    from safetensors.numpy import load_file

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "embed_tokens": "token_embd",
        "norm": "output_norm",
    }
    arrays = {}
    for key, array in load_file(folder / "model.safetensors").items():
        name = key.removeprefix("model.").removesuffix(".weight")
        layer = ""
        if name.startswith("layers."):
            _, index, name = name.split(".", 2)
            layer = f"blk.{index}."
        arrays[f"{layer}{names[name]}.weight"] = array + 1.0 if array.ndim == 1 else array
    return arrays


def test_another_dtype_rounds_once(tmp_path):
    model = formats.model(formats.CONFIGS["gemma2"])
    convert(save(model, tmp_path, "huggingface"), tmp_path / "y", dtype="bfloat16")
    for ours, theirs in zip(
        jax.tree.leaves(model),
        jax.tree.leaves(load_model(tmp_path / "y", dtype="float32")),
        strict=True,
    ):
        rounded = np.asarray(ours).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(theirs), rounded)


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    model = formats.model(formats.CONFIGS["gemma1 mqa"])
    model = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(1e9), model)
    source = save(model, tmp_path, "huggingface")
    with pytest.raises(CheckpointError, match="embedding.weight holds numbers that float16 cannot"):
        convert(source, tmp_path / "y", dtype="float16")
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_that_is_written_wrongly_is_found(format, tmp_path, monkeypatch):
    model = formats.model(formats.CONFIGS["gemma2"])
    source = save(model, tmp_path, "huggingface")
    writer = {"huggingface": "write_folder", "gguf": "write_gguf"}.get(format, "write_orbax")
    honest = getattr(_write, writer)

    def dishonest(model, *arguments, **options):
        weight = np.array(model.layers[2].ffw.down.weight)
        weight[3, 5] += 1e-3
        wrong = [leaf if leaf.shape != weight.shape else weight for leaf in jax.tree.leaves(model)]
        honest(jax.tree.unflatten(jax.tree.structure(model), wrong), *arguments, **options)

    monkeypatch.setattr(_write, writer, dishonest)
    with pytest.raises(CheckpointError, match="is not what was to be written.*ffw.down"):
        convert(source, place(tmp_path, format, "y"), format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_progress_counts_bytes_twice(tmp_path):
    model = formats.model(formats.CONFIGS["gemma2"])
    source = save(model, tmp_path, "huggingface")
    for format in FORMATS:
        calls: tuple[list, list] = ([], [])
        convert(
            source,
            place(tmp_path, format, f"y-{format}"),
            format=format,
            progress=lambda *call: calls[0].append(call),
            check_progress=lambda *call: calls[1].append(call),
        )
        for made in calls:
            done = [call[0] for call in made]
            assert done == sorted(done) and done[-1] == made[-1][1]
            assert len({call[2] for call in made}) == len(jax.tree.leaves(model))


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_that_is_there_is_replaced_on_request_alone(format, tmp_path):
    source = save(formats.model(formats.CONFIGS["gemma2"]), tmp_path, "huggingface", "0")
    target = save(formats.model(formats.CONFIGS["gemma2"], seed=1), tmp_path, format, "y")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="y.* is there already; choose another name, or have"):
        convert(source, target, format=format)
    # An option that makes no sense changes nothing either.
    with pytest.raises(CheckpointError, match="got dtype=fp8"):
        convert(source, target, format=format, dtype="fp8", force=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    convert(source, target, format=format, force=True)
    formats.assert_same(
        load_model(target, dtype="float32"), formats.model(formats.CONFIGS["gemma2"])
    )


def test_a_tower_that_is_there_is_replaced_on_request_alone(tmp_path):
    model = formats.model(formats.SEEING["3 averaged"])
    options = {"tokenizer": formats.tokenizer(images=True)}
    eg.save(model, tmp_path / "x", **options)
    (tmp_path / "mmproj-y.gguf").write_bytes(b"another's")
    with pytest.raises(CheckpointError, match="mmproj-y.gguf is there already"):
        convert(tmp_path / "x", tmp_path / "y.gguf")
    assert (tmp_path / "mmproj-y.gguf").read_bytes() == b"another's"
    convert(tmp_path / "x", tmp_path / "y.gguf", force=True)
    assert load_model(tmp_path / "y.gguf").config.vision is not None


# What goes along.


def test_what_a_folder_says_goes_through_a_gguf(tmp_path):
    source = save(formats.model(formats.CONFIGS["gemma3"]), tmp_path, "huggingface")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"extra": 7}))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    generation = {"eos_token_id": [1, 106], "temperature": 0.5}
    (source / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = 1009
    (source / "config.json").write_text(json.dumps(config))

    convert(source, tmp_path / "again")
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        theirs = json.loads if name.endswith("json") else str
        assert theirs((tmp_path / "again" / name).read_text()) == theirs(
            (source / name).read_text()
        )
    # All ids that end a text by any of the files.
    ends = {"eos_token_id": [1, 270, 106]}
    assert json.loads((tmp_path / "again/config.json").read_text()) == config | ends

    convert(source, tmp_path / "x.gguf")
    assert load_chat_template(tmp_path / "x.gguf") == TEMPLATE
    convert(tmp_path / "x.gguf", tmp_path / "back")
    assert load_chat_template(tmp_path / "back") == TEMPLATE
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert back["max_position_embeddings"] == 1009
    ours, theirs = (
        SentencePieceTokenizer.from_file(folder / "tokenizer.model")
        for folder in (source, tmp_path / "back")
    )
    for text in ("hello <table> hell", "<end_of_turn>é\n  the"):
        assert ours.encode(text) == theirs.encode(text)
    merges, merges_back = (
        json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
        for folder in (source, tmp_path / "back")
    )
    assert merges == merges_back


def test_what_a_gguf_says_about_its_origin_goes_along(tmp_path):
    options = gguf_files.OPTIONS | {"general.license": "gemma", "general.tags": ["x", "y"]}
    path = gguf_files.write(tmp_path / "x.gguf", options)
    convert(path, tmp_path / "y.gguf")
    from equigemma.checkpoint.gguf._container import GGUFFile

    found = GGUFFile.open(tmp_path / "y.gguf").metadata
    assert found["general.license"] == "gemma" and found["general.tags"] == ["x", "y"]
    formats.assert_same(
        load_model(path, dtype="float32"), load_model(tmp_path / "y.gguf", dtype="float32")
    )


def test_several_files(tmp_path):
    model = formats.model(formats.CONFIGS["gemma3"])
    source = save(model, tmp_path, "orbax")
    convert(source, tmp_path / "y", shard_bytes=20_000)
    files = sorted((tmp_path / "y").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "y/model.safetensors.index.json").read_text())
    assert {path.name for path in files} == set(index["weight_map"].values())
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(model))
    # A header is some hundred bytes for each tensor.
    assert max(path.stat().st_size for path in files) < max(20_000, largest) + 4_000
    formats.assert_same(model, load_model(tmp_path / "y", dtype="float32"))


def test_layouts_of_deepminds_files():
    """What their loaders expect: one projection for all heads, and the axes of their tables."""
    for name in ("gemma1 mha", "gemma1 mqa", "gemma2"):
        model = formats.model(formats.CONFIGS[name])
        stored = relayout(model, official_layout(model.config))
        kinds = [layer.attention.qkv_axes for layer in stored.config.layers]
        assert set(kinds) == {"CNDH" if name == "gemma1 mha" else "NDH,CKDH"}
        tokens = jnp.arange(9, dtype=jnp.int32)
        # The same numbers, summed by a program of another layout.
        np.testing.assert_allclose(
            formats.logits(stored, tokens), formats.logits(model, tokens), atol=2e-5
        )


def test_an_orbax_folder_without_a_note_needs_a_config(tmp_path):
    """DeepMind's own folders keep no config: it follows from shapes, or is given."""
    import orbax.checkpoint as ocp

    from equigemma import linen

    model = formats.model(formats.CONFIGS["gemma3"])
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "x", linen.to_variables(model)["params"])
    with pytest.raises(CheckpointError, match="its shapes fit no known variant; pass the one"):
        load_model(tmp_path / "x")
    found = load_model(tmp_path / "x", config=model.config, dtype="float32")
    formats.assert_same(model, found)


# What cannot be converted.


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("x", {}, "is what is to be read; give another name"),
        ("y.gguf", {"format": "huggingface"}, "is a folder; .* is the name of a file"),
        ("y", {"format": "gguf"}, "must end in .gguf"),
        ("y.safetensors", {}, "is the name of a file"),
        ("y", {"dtype": "q8_0"}, "saved as float32, bfloat16 or float16, got dtype=q8_0"),
        ("y.gguf", {"dtype": "q4_0"}, "float16 or q8_0, got dtype=q4_0"),
        ("y", {"dtype": "int8"}, "got dtype=int8"),
        ("y", {"shard_bytes": 0}, "must have room for something"),
        ("y", {"revision": "main"}, "is for names on the hub"),
        ("other", {}, "holds notes.txt, which is no part of a checkpoint and would be lost"),
        ("file", {}, "is a file; give the name of a folder"),
        ("folder.gguf", {}, "is a folder; give the name of a file"),
    ],
)
def test_what_cannot_be_converted(target, options, message, tmp_path):
    source = save(formats.model(formats.CONFIGS["gemma1 mqa"]), tmp_path, "huggingface")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / target, **options)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def test_a_gguf_needs_a_tokenizer(tmp_path):
    eg.save(formats.model(formats.CONFIGS["gemma1 mqa"]), tmp_path / "x")
    with pytest.raises(CheckpointError, match="A .gguf holds its tokenizer, and there is none"):
        convert(tmp_path / "x", tmp_path / "y.gguf")


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    config: ModelConfig = replace(formats.CONFIGS["gemma1 mqa"], vocab=269)
    with pytest.raises(CheckpointError, match="has 271 tokens, and the model's embedding only 269"):
        eg.save(formats.model(config), tmp_path / "x", tokenizer=formats.tokenizer())


def test_an_older_checkpoint_is_replaced_as_a_whole(tmp_path):
    first, second = (formats.model(formats.CONFIGS[name]) for name in ("gemma1 mqa", "gemma2"))
    for format in FORMATS:
        path = save(first, tmp_path, format, f"x-{format}")
        save(second, tmp_path, format, f"x-{format}")
        formats.assert_same(second, load_model(path, dtype="float32"))
    save(first, tmp_path, "huggingface", shard_bytes=10_000)
    save(second, tmp_path, "huggingface")
    assert not list((tmp_path / "x").glob("model-*")) and not list(
        (tmp_path / "x").glob("*.index*")
    )
