"""GGUF files of Gemma 3n and 4: what llama.cpp computes from them is in `parity/`."""

import math
from dataclasses import replace
from pathlib import Path

import formats
import numpy as np
import pytest


gguf = pytest.importorskip("gguf", reason='needs pip install "equigemma[test]"')

import equigemma as eg  # noqa: E402
from equigemma.checkpoint import CheckpointError, load_model  # noqa: E402
from equigemma.checkpoint._convert import convert  # noqa: E402
from equigemma.checkpoint.core._keymap import leaves, plan  # noqa: E402
from equigemma.checkpoint.core._layout import split_layout  # noqa: E402
from equigemma.checkpoint.gemma._params import skeleton  # noqa: E402
from equigemma.checkpoint.gguf._config import read_config  # noqa: E402
from equigemma.checkpoint.gguf._container import GGUFFile, Tensor  # noqa: E402
from equigemma.checkpoint.gguf._leaves import file_shapes  # noqa: E402
from equigemma.checkpoint.gguf._rules import rules  # noqa: E402
from equigemma.checkpoint.gguf._vocab import read_tokenizer  # noqa: E402
from equigemma.config import AltUpConfig, ModelConfig  # noqa: E402
from equigemma.tokenizers._tokenizer_json import to_json  # noqa: E402


def save(name: str, folder: Path, **options) -> Path:
    path = folder / "x.gguf"
    eg.save(formats.model(formats.NEWER[name]), path, tokenizer=formats.tokenizer(), **options)
    return path


@pytest.mark.parametrize("name", ["gemma4 small", "gemma4 experts"])
def test_a_file_and_back(name, tmp_path):
    model = formats.model(formats.NEWER[name])
    formats.assert_same(model, load_model(save(name, tmp_path), dtype="float32"))


def test_tokens_without_a_row_count_as_the_first(tmp_path):
    """The second embedding of Gemma 3n has fewer rows than the first; in a file it has as many."""
    model = formats.model(formats.gemma3n(5))
    eg.save(model, tmp_path / "x", tokenizer=formats.tokenizer())
    convert(tmp_path / "x", tmp_path / "y.gguf")
    convert(tmp_path / "y.gguf", tmp_path / "z")
    found = load_model(tmp_path / "y.gguf", dtype="float32")
    formats.assert_same(found, load_model(tmp_path / "z", dtype="float32"))
    known, full = formats.VOCAB - 2, dict(leaves(found))
    table = np.asarray(full["per_layer.weight"])
    np.testing.assert_array_equal(table[known:], table[:1].repeat(2, axis=0))
    for path, leaf in leaves(model):
        np.testing.assert_array_equal(full[path][:known], leaf[:known], err_msg=path)


def test_packed_experts_are_compared(tmp_path):
    config = formats.wide(formats.NEWER["gemma4 experts"])
    eg.save(formats.model(config), tmp_path / "x", tokenizer=formats.tokenizer())
    convert(tmp_path / "x", tmp_path / "y.gguf", dtype="q8_0")
    kinds = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(tmp_path / "y.gguf").tensors
    }
    assert kinds["blk.0.ffn_gate_up_exps.weight"] == kinds["blk.1.ffn_down_exps.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down_exps.scale"] == "F32"


@pytest.mark.parametrize("name", formats.NEWER)
def test_names_are_those_of_the_library(name, tmp_path):
    reader = gguf.GGUFReader(save(name, tmp_path))
    architecture = name.split(" ")[0]
    kinds = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[kinds[architecture]]}
    found = {tensor.name.rpartition(".")[0] for tensor in reader.tensors}
    assert len(found) > 20
    for index in range(len(formats.NEWER[name].layers)):
        found = {key.replace(f"blk.{index}.", "blk.{bid}.") for key in found}
    assert found <= known
    keys = {
        key.replace("{arch}", architecture)
        for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
        for key in vars(group).values()
        if isinstance(key, str)
    }
    assert {key for key in reader.fields if key.startswith(architecture)} <= keys


def published(name: str) -> tuple[ModelConfig, dict]:
    """A published size, and what the converter writes of it besides what all have."""
    preset = eg.variants.get(name)
    count = len(preset.layers)
    if name == "gemma3n-e4b":
        sparse = [1.6448533535003662] * 10
        options = {
            "attention.key_length": 256,
            "attention.value_length": 256,
            "attention.head_count_kv": 2,
            "attention.sliding_window_pattern": ([True] * 4 + [False]) * 7,
            "attention.shared_kv_layers": 15,
            "feed_forward_length": [16_384] * count,
            "altup.active_idx": 0,
            "altup.num_inputs": 4,
            "activation_sparsity_scale": sparse + [-math.inf] * (count - 10),
            "embedding_length_per_layer_input": 256,
        }
        return replace(preset, final_softcap=30.0), options
    options = {
        "attention.key_length": 512,
        "attention.value_length": 512,
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
        "rope.dimension_count": 512,
        "rope.dimension_count_swa": 256,
        "final_logit_softcapping": 30.0,
    }
    if name == "gemma4-e2b":
        return preset, options | {
            "attention.head_count_kv": 1,
            "attention.sliding_window_pattern": ([True] * 4 + [False]) * 7,
            "attention.shared_kv_layers": 20,
            "feed_forward_length": [6144] * 15 + [12_288] * 20,
            "embedding_length_per_layer_input": 256,
        }
    return preset, options | {
        "attention.head_count_kv": ([8] * 5 + [2]) * 5,
        "attention.sliding_window_pattern": ([True] * 5 + [False]) * 5,
        "attention.shared_kv_layers": 0,
        "feed_forward_length": 2112,
        "embedding_length_per_layer_input": 0,
        "expert_count": 128,
        "expert_used_count": 8,
        "expert_feed_forward_length": 704,
    }


@pytest.mark.parametrize("name", ["gemma3n-e4b", "gemma4-e2b", "gemma4-26b-a4b"])
def test_metadata_of_published_sizes(name):
    config, options = published(name)
    config = split_layout(config)
    architecture = name.split("-")[0]
    options |= {
        "context_length": 32_768,
        "embedding_length": config.width,
        "block_count": len(config.layers),
        "attention.head_count": config.layers[0].attention.heads,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": config.layers[0].attention.window,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
    }
    metadata = {f"{architecture}.{key}": value for key, value in options.items()}
    metadata["general.architecture"] = architecture
    metadata["tokenizer.ggml.tokens"] = ["x"] * config.vocab
    tensors = {
        key: Tensor(key, 0, entry.key_shape, 0, 1, 4)
        for entry in plan(file_shapes(skeleton(config)), rules(config))
        for key in entry.keys
    }
    factors = np.array([1.0] * 64 + [1e30] * 192, np.float32)
    assert read_config(GGUFFile(Path("x.gguf"), metadata, tensors), factors) == config


def changed(config: ModelConfig, index: int, **attention) -> ModelConfig:
    layers = list(config.layers)
    layers[index] = replace(layers[index], attention=replace(layers[index].attention, **attention))
    return replace(config, layers=tuple(layers))


SMALL, ALTUP = formats.NEWER["gemma4 small"], formats.NEWER["gemma3n"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(ALTUP, final_softcap=None), r"final_softcap: 30\.0, not None"),
        (replace(ALTUP, stream=AltUpConfig(streams=3, laurel_rank=64, modes=3)), r"stream"),
        (
            replace(ALTUP, layers=ALTUP.layers[10:15]),
            r"layers\[0\]\.ffw\.cutoff: 1\.6\d+, not None",
        ),
        (changed(SMALL, 0, heads=6), r"layers\[0\]\.attention\.heads: 3, not 6"),
        (replace(SMALL, layers=SMALL.layers[1:2]), r"no such model without a layer that has a wi"),
        (
            replace(SMALL, per_layer=replace(SMALL.per_layer, vocab=formats.VOCAB + 1)),
            r"second embedding has 278 rows, more than the 277 tokens",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(config, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        eg.save(formats.model(config), tmp_path / "x.gguf", tokenizer=formats.tokenizer())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma4 small", {"attention.shared_kv_layers": 3}, r"3, which leaves too few of 4 layers"),
        ("gemma4 small", {"attention.shared_kv_layers": 0}, r"blk\.2\.attn_k\.weight: missing"),
        ("gemma4 small", {"attention.sliding_window_pattern": 5}, r"entry for each of 4 layers"),
        ("gemma4 small", {"feed_forward_length": [17, 0, 1, 1]}, r"such a number for each of 4"),
        ("gemma4 small", {"attention.key_length": 22}, r"value_length is 20; only 22 is supported"),
        ("gemma4 small", {"rope.scaling.factor": 8.0}, r"positions are scaled by 8\.0"),
        ("gemma4 small", {"block_count": 2**50}, r"claim 1125899906842624 layers"),
        ("gemma4 small", {"block_count": 2**60}, r"must be below 2\*\*53, got a huge number"),
        (
            "gemma4 experts",
            {"expert_used_count": 8},
            r"no valid model\. MoEConfig\.num_experts_per_token must be at m",
        ),
        ("gemma4 experts", {"expert_count": 2**40}, r"describe a weight of \d+ numbers"),
        ("gemma3n", {"altup.active_idx": 1}, r"altup\.active_idx is 1; only 0 is supported"),
        ("gemma3n", {"activation_sparsity_scale": [1.0]}, r"a number for each of 25 layers, -inf"),
    ],
)
def test_metadata_that_fit_no_model(name, change, message, files, monkeypatch):
    read = GGUFFile.open

    def damaged(path: Path) -> GGUFFile:
        file = read(path)
        architecture = file.metadata["general.architecture"]
        other = {f"{architecture}.{key}": value for key, value in change.items()}
        return replace(file, metadata=dict(file.metadata) | other)

    monkeypatch.setattr(GGUFFile, "open", damaged)
    with pytest.raises(CheckpointError, match=message):
        load_model(files[name])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return {name: save(name, tmp_path_factory.mktemp("files")) for name in formats.NEWER}


def test_factors_of_angles(files):
    file = GGUFFile.open(files["gemma4 small"])
    for factors in (None, [1.0] * 9, [0.5] + [1.0] * 9, [1e30] * 10, [math.nan] * 10):
        with pytest.raises(CheckpointError, match="rope_freqs.weight must be 10 numbers, first"):
            read_config(file, None if factors is None else np.array(factors, np.float32))


def test_a_vocabulary_of_merges(files):
    """As the converter writes it: no scores that say anything, and no type for the unknown."""
    metadata = dict(GGUFFile.open(files["gemma4 small"]).metadata)
    tokenizer = formats.tokenizer()
    merges = to_json(tokenizer.vocabulary)["model"]["merges"]
    count = len(metadata["tokenizer.ggml.tokens"])
    metadata |= {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.scores": [-1000.0] * count,
    }
    found = read_tokenizer(metadata, Path("x.gguf"))
    for text in ("hello the hotel", "  two  é\n <table> lo", "<eos> tel"):
        for special in (False, True):
            ids = tokenizer.encode(text, special=special)
            assert found.encode(text, special=special) == ids
    metadata["tokenizer.ggml.merges"] = ["h", "e l"]
    with pytest.raises(CheckpointError, match="merges do not name two pieces each: 'h'"):
        read_tokenizer(metadata, Path("x.gguf"))
