"""GGUF files: the same numbers as the library that wrote them, and no trust in what they claim."""

import json
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import equigemma as eg
from equigemma.checkpoint import CheckpointError, load, load_config
from equigemma.checkpoint.core import _keymap
from equigemma.checkpoint.gguf import _config as _gguf_config
from equigemma.checkpoint.gguf import _container as _gguf_file
from equigemma.checkpoint.gguf._container import GGUFFile
from equigemma.config import RopeConfig


gguf = pytest.importorskip("gguf", reason='needs pip install "equigemma[gguf]"')
pytest.importorskip("sentencepiece", reason='needs pip install "equigemma[gguf]"')

import gguf_files as files  # noqa: E402


GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return files.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


# What is in a file.


def test_header_is_what_the_library_reads(path):
    ours, theirs = GGUFFile.open(path), gguf.GGUFReader(path)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    for key in keys:
        value = ours.metadata[key]
        expected = theirs.fields[key].contents()
        # float32 comes back as the decimal that was meant.
        np.testing.assert_array_equal(
            np.asarray(value, np.float32) if isinstance(value, float) else value,
            np.asarray(expected, np.float32) if isinstance(value, float) else expected,
        )
    assert ours.metadata["gemma3.attention.layer_norm_rms_epsilon"] == 1e-6
    for tensor in theirs.tensors:
        located = ours.tensors[tensor.name]
        assert located.shape == tuple(tensor.shape.tolist()[::-1])
        assert (located.offset, located.kind) == (tensor.data_offset, tensor.tensor_type)


def unpackable() -> list:
    found = []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            with np.errstate(all="ignore"):
                gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


@pytest.mark.parametrize("kind", unpackable(), ids=lambda kind: kind.name)
def test_every_type_gives_the_numbers_of_the_library(kind, tmp_path, monkeypatch):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 11, 3 * 256
    packed = np.random.default_rng(0).integers(0, 256, (rows, columns // block * size), np.uint8)
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        packed = packed.view({2: np.float16, 4: np.float32}[size])
    path = files.write(tmp_path / "x.gguf", arrays={"x": packed}, kinds={"x": kind})
    monkeypatch.setattr(_gguf_file, "_PIECE", 5 * 256)
    file = GGUFFile.open(path)
    with np.errstate(all="ignore"), ThreadPoolExecutor(2) as pool:
        expected = gguf.quants.dequantize(packed, kind)
        assert expected.shape == (rows, columns)
        for dtype in (np.float32, jnp.bfloat16, np.float16):
            out = file.read(file.tensors["x"], np.dtype(dtype), pool)
            np.testing.assert_array_equal(
                out.astype(np.float32), expected.astype(dtype).astype(np.float32)
            )


def test_a_type_without_numbers_is_refused(tmp_path):
    arrays = files.tensors() | {"output_norm.weight": np.ones(files.WIDTH, np.int32)}
    path = files.write(tmp_path / "x.gguf", arrays=arrays)
    with pytest.raises(CheckpointError, match=r"output_norm\.weight has type I32, which the inst"):
        load(path)


# What a model is made of.


def gguf_arrays(params: dict[str, np.ndarray], transposed_gate: bool) -> dict[str, np.ndarray]:
    """DeepMind's parameters as llama.cpp's converter writes them: two axes, outputs first."""
    arrays = {"token_embd.weight": params["embedder/input_embedding"]}
    arrays["output_norm.weight"] = 1 + params["final_norm/scale"]
    layers = sum(name.endswith("mlp/linear") for name in params)
    for index in range(layers):
        ours, theirs = f"layer_{index}/", f"blk.{index}."
        layer = {
            name.removeprefix(ours): array
            for name, array in params.items()
            if name.startswith(ours)
        }
        if "attn/qkv_einsum/w" in layer:
            q, k, v = layer["attn/qkv_einsum/w"]
        else:
            q, (k, v) = layer["attn/q_einsum/w"], layer["attn/kv_einsum/w"]
        for name, heads in (("attn_q", q), ("attn_k", k), ("attn_v", v)):
            arrays[f"{theirs}{name}.weight"] = np.concatenate([head.T for head in heads])
        output = layer["attn/attn_vec_einsum/w"]
        arrays[f"{theirs}attn_output.weight"] = np.concatenate(list(output)).T
        for name, gate in zip(("ffn_gate", "ffn_up"), layer["mlp/gating_einsum"], strict=True):
            arrays[f"{theirs}{name}.weight"] = gate if transposed_gate else gate.T
        arrays[f"{theirs}ffn_down.weight"] = layer["mlp/linear"].T
        norms = {
            "attn_norm": "pre_attention_norm/scale",
            "post_attention_norm": "post_attention_norm/scale",
            "ffn_norm": "pre_ffw_norm/scale",
            "post_ffw_norm": "post_ffw_norm/scale",
            "attn_q_norm": "attn/_query_norm/scale",
            "attn_k_norm": "attn/_key_norm/scale",
        }
        for name, source in norms.items():
            if source in layer:
                arrays[f"{theirs}{name}.weight"] = 1 + layer[source]
    # As many rows as the file's vocabulary has tokens.
    rows = len(files.TOKENS) - len(arrays["token_embd.weight"])
    arrays["token_embd.weight"] = np.pad(arrays["token_embd.weight"], ((0, rows), (0, 0)))
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


@pytest.mark.parametrize("name", ["gemma2_mha", "gemma3"])
def test_logits_of_deepminds_models(name, tmp_path):
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    fields = json.loads(str(golden["config"]))
    params = {
        key.removeprefix("params/"): value
        for key, value in golden.items()
        if key.startswith("params/")
    }
    architecture = name.split("_")[0]
    options = {
        "embedding_length": fields["embed_dim"],
        "block_count": len(fields["attention_types"]),
        "feed_forward_length": fields["hidden_dim"],
        "attention.head_count": fields["num_heads"],
        "attention.head_count_kv": fields["num_kv_heads"],
        "attention.key_length": fields["head_dim"],
        "attention.value_length": fields["head_dim"],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": fields["sliding_window_size"],
        "rope.freq_base": float(fields["global_base_frequency"]),
        "rope.scaling.type": "linear",
        "rope.scaling.factor": fields["global_scale_factor"],
        # Gemma 2's soft-caps are left out: these are the values that a file means then.
    }
    path = files.write(
        tmp_path / "golden.gguf",
        {f"{architecture}.{key}": value for key, value in options.items()},
        gguf_arrays(params, fields["transpose_gating_einsum"]),
        architecture=architecture,
    )
    model, _ = load(path, dtype=jnp.float32)
    tokens = golden["tokens"]
    real = tokens != 0
    positions = np.where(real, np.cumsum(real, axis=-1) - 1, -1).astype(np.int32)
    output = tiny.run(model, jnp.asarray(tokens), positions=jnp.asarray(positions))
    # The norms lose a digit where 1 is added and taken off again; else as in test_golden.py.
    np.testing.assert_allclose(
        output.logits[real][:, : fields["num_embed"]], golden["logits"][real], rtol=0, atol=5e-5
    )


def test_every_number_arrives_in_every_dtype(path):
    model, tokenizer = load(path, dtype="float32")
    arrays = files.tensors()
    np.testing.assert_array_equal(model.embedding.weight, arrays["token_embd.weight"])
    np.testing.assert_array_equal(model.final_norm.scale, arrays["output_norm.weight"] - 1)
    leaves = dict(_keymap.leaves(model))
    query = np.asarray(leaves["layers.1.attention.projection.q.weight"])
    np.testing.assert_array_equal(
        query[4, :, 3], arrays["blk.1.attn_q.weight"][4 * files.HEAD_DIM + 3]
    )
    assert tokenizer.decode(tokenizer.encode(" hello <table>")) == " hello <table>"
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow, _ = load(path, dtype=dtype)
        for wide, leaf in zip(jax.tree.leaves(model), jax.tree.leaves(narrow), strict=True):
            assert leaf.dtype == dtype
            np.testing.assert_array_equal(leaf, wide.astype(dtype))


def test_progress(path):
    calls = []
    model, _ = load(path, progress=lambda *call: calls.append(call))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    done, totals, names = zip(*calls, strict=True)
    assert set(totals) == {size} and done[-1] == size
    assert list(done) == sorted(set(done))
    assert len(set(names)) == len(jax.tree.leaves(model))


# What the metadata mean.


def test_a_gemma3_config(path):
    config = load_config(path)
    kinds = [(layer.attention.window, layer.attention.rope) for layer in config.layers]
    assert kinds == [(files.WINDOW, RopeConfig(theta=10_000.0))] * files.LAYERS
    assert config.layers[0].attention.query_scale == files.HEAD_DIM**-0.5
    assert config.vocab == len(files.TOKENS)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # Every second layer, as a number or as a list.
        ({"attention.sliding_window_pattern": 2}, [5, None, 5]),
        ({"attention.sliding_window_pattern": [False, True, True]}, [None, 5, 5]),
        ({"attention.sliding_window_pattern": 1}, [None] * 3),
        ({"attention.sliding_window_pattern": 0}, [5, 5, 5]),
        ({"attention.sliding_window": 0}, [None] * 3),
        ({"attention.sliding_window": None}, [None] * 3),
    ],
)
def test_windows(change, expected, tmp_path):
    options = files.OPTIONS | {f"gemma3.{key}": value for key, value in change.items()}
    config = load_config(files.write(tmp_path / "x.gguf", options))
    assert [layer.attention.window for layer in config.layers] == expected


def test_options_of_gemma3(tmp_path):
    change = {
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
        "gemma3.rope.freq_base_swa": 5_000.0,
        "gemma3.attention.sliding_window_pattern": 3,
        "gemma3.final_logit_softcapping": 30.0,
        "gemma3.vocab_size": len(files.TOKENS),
        "gemma3.attention.causal": True,
    }
    config = load_config(files.write(tmp_path / "x.gguf", files.OPTIONS | change))
    assert [layer.attention.rope for layer in config.layers] == [
        RopeConfig(theta=5_000.0),
        RopeConfig(theta=5_000.0),
        RopeConfig(theta=1_000_000.0, scale=8.0),
    ]
    assert config.final_softcap == 30.0


def presets(prefix: str) -> list[str]:
    return [name for name in eg.variants.names() if name.startswith(prefix)]


@pytest.mark.parametrize("name", presets("gemma1") + presets("gemma2") + presets("gemma3-"))
def test_metadata_of_every_published_size(name):
    """What the converter writes for the published sizes is what our tables say."""
    preset = eg.variants.get(name).text_only()
    architecture = name.split("-")[0].replace("gemma1", "gemma")
    attention = preset.layers[-1].attention
    last_global = [layer.attention for layer in preset.layers if layer.attention.window is None][-1]
    options = {
        "embedding_length": preset.width,
        "block_count": len(preset.layers),
        "feed_forward_length": preset.layers[0].ffw.hidden_dim,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv.heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    if architecture != "gemma":
        options["attention.sliding_window"] = preset.layers[0].attention.window
    if architecture == "gemma2":
        options |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if architecture == "gemma3":
        options["rope.freq_base"] = last_global.rope.theta
        if last_global.rope.scale != 1.0:
            options |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    sizes = (preset.vocab, attention.heads * attention.head_dim, preset.layers[0].ffw.hidden_dim)
    file = GGUFFile(
        Path("x.gguf"),
        {
            "general.architecture": architecture,
            "tokenizer.ggml.tokens": ["x"] * preset.vocab,
            **{f"{architecture}.{key}": value for key, value in options.items()},
        },
        {
            str(index): _gguf_file.Tensor(str(index), 0, (max(sizes), preset.width), 0, 1, 4)
            for index in range(len(preset.layers))
        },
    )
    # How projections are stored is no part of the architecture: a file has one way for all.
    expected = replace(
        preset,
        layers=tuple(
            replace(
                layer,
                attention=replace(layer.attention, qkv_axes="NDH,CKDH"),
                ffw=replace(layer.ffw, gate_axes="CFD"),
            )
            for layer in preset.layers
        ),
    )
    assert _gguf_config.read_config(file) == expected


# What is refused, and in which words.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gemma3.attention.scale": 0.5}, r"not supported: gemma3\.attention\.scale\."),
        ({"gemma3.attention.causal": False}, r"causal is False; only True is supported here"),
        ({"gemma3.expert_count": 8}, r"expert_count is 8; only 0 is supported here"),
        ({"gemma3.rope.scaling.type": "yarn"}, r"'yarn'; only 'none' and 'linear'"),
        ({"gemma3.rope.dimension_count": 4}, r"dimension_count is 4; only 10 is supported here"),
        ({"gemma3.attention.value_length": 4}, r"value_length is 4; only 10 is supported here"),
        ({"gemma3.block_count": None}, r"its metadata lack gemma3\.block_count"),
        ({"gemma3.block_count": 2**31}, r"claim 2147483648 layers, and it has 41 tensors"),
        ({"gemma3.embedding_length": 2**31}, r"describe a weight of \d+ numbers"),
        ({"gemma3.attention.head_count": 0}, r"head_count must be a whole number from 1 up"),
        ({"gemma3.attention.head_count": "6"}, r"head_count must be a number, got '6'"),
        ({"gemma3.attention.head_count": 5}, r"must divide the number of query heads; got 3 and 5"),
        ({"gemma3.attention.sliding_window": 5.5}, r"must be a whole number from 0 up, got 5.5"),
        ({"gemma3.rope.freq_base": float("nan")}, r"freq_base must be a number, got nan"),
        (
            {"gemma3.attention.sliding_window_pattern": [True]},
            r"an entry for each of 3 layers; got \[True\]",
        ),
        ({"gemma3.vocab_size": 31}, r"vocab_size is 31; only 271 is supported here"),
        ({"gemma3.attention.sliding_window_pattern": "no"}, r"must be a number, or a list"),
        ({"gemma3.attention.causal": [1, 1]}, r"causal is \[1, 1\]; only True is supported here"),
        ({"gemma3.rope.scaling.type": [1, 1]}, r"\[1, 1\]; only 'none' and 'linear'"),
        ({"gemma3.feed_forward_length": [17, 17, 17]}, r"must be a number, got \[17, 17, 17\]"),
        ({"split.count": 3}, r"one part of several; join them"),
    ],
)
def test_an_option_that_is_not_known(options, message, tmp_path):
    path = files.write(tmp_path / "x.gguf", files.OPTIONS | options)
    with pytest.raises(CheckpointError, match=rf"x\.gguf cannot be loaded: .*{message}"):
        load(path)


def test_another_architecture(tmp_path):
    path = files.write(tmp_path / "x.gguf", architecture="llama")
    with pytest.raises(CheckpointError, match=r"is 'llama'; the known ones are gemma, gemma2, gem"):
        load(path)


def test_all_differences_of_the_tensors_at_once(tmp_path):
    arrays = files.tensors()
    del arrays["blk.1.attn_k.weight"]
    arrays["extra.weight"] = np.zeros((2, 3), np.float32)
    arrays["blk.0.ffn_up.weight"] = np.zeros((files.HIDDEN, files.WIDTH + 1), np.float32)
    path = files.write(tmp_path / "x.gguf", arrays=arrays)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "3 difference(s)" in str(caught.value)
    for line in (
        "blk.1.attn_k.weight: missing",
        "extra.weight: not a part of this model",
        "blk.0.ffn_up.weight: expected shape [17, 7], got [17, 8]",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gpt2"}, "of type 'gpt2'; only 'llama', which is SentencePiece, and 'g"),
        ({"add_space_prefix": True}, "add_space_prefix is set, which is so in no Gemma"),
        ({"tokens": None}, r"lacks tokenizer\.ggml\.tokens"),
        ({"scores": None}, r"lacks tokenizer\.ggml\.scores"),
        ({"scores": files.TYPES}, r"scores, or it is no list of the right type"),
        ({"scores": files.SCORES[1:]}, "has 271 tokens, 270 scores and 271 types"),
        ({"scores": [float("nan")] * 271}, "scores or types of this vocabulary make no sense"),
        ({"token_type": [7] * 271}, "scores or types of this vocabulary make no sense"),
        ({"tokens": ["<x>", *files.TOKENS[1:]]}, "no piece called <pad>"),
        ({"tokens": [*files.TOKENS[:-1], "lo"]}, "sentencepiece refuses this vocabulary"),
    ],
)
def test_a_vocabulary_that_cannot_be_used(change, message, tmp_path):
    vocabulary = files.VOCABULARY | {f"tokenizer.ggml.{key}": to for key, to in change.items()}
    path = files.write(tmp_path / "x.gguf", vocabulary=vocabulary)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def damaged(path: Path, tmp_path: Path, old: bytes, new: bytes) -> Path:
    """A copy with the first `old` replaced by `new` of the same length."""
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    copy = tmp_path / "damaged.gguf"
    copy.write_bytes(data.replace(old, new, 1))
    return copy


def name(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF\3\0\0\0", b"GGML\3\0\0\0", "does not begin with GGUF"),
        (b"GGUF\3\0\0\0", b"GGUF\1\0\0\0", "its version is 1; versions 2 and 3 are read"),
        (b"GGUF\3\0\0\0", b"GGUF\0\0\0\3", "its version is 50331648"),
        # Claimed: 2^60 tensors, a name of 2^62 bytes, 2^61 tokens, a tensor of 2^63 rows.
        (struct.pack("<Q", 41), struct.pack("<Q", 1 << 60), "its table of contents takes"),
        (
            name("general.architecture"),
            struct.pack("<Q", 1 << 62) + b"x" * 20,
            "ends behind the file",
        ),
        (struct.pack("<IQ", 8, 271), struct.pack("<IQ", 8, 1 << 61), "tokens takes"),
        (struct.pack("<QQ", 7, 271), struct.pack("<QQ", 7, 1 << 63), "token_embd.weight ends at"),
        (struct.pack("<IQQ", 2, 7, 271), struct.pack("<IQQ", 99, 7, 271), "99 axes"),
        (struct.pack("<QQ", 7, 271), struct.pack("<QQ", 0, 271), "no axis may be empty"),
        (name("blk.0.attn_k.weight"), name("blk.0.attn_q.weight"), "attn_q.weight is there twice"),
        (name("tokenizer.ggml.scores"), name("tokenizer.ggml.tokens"), "tokens is there twice"),
        (b"<table>", b"<t\xff\xfele>", "tokens is not UTF-8"),
    ],
)
def test_a_damaged_file(path, tmp_path, old, new, message):
    copy = damaged(path, tmp_path, old, new)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            GGUFFile.open(copy)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Whatever a file claims, no memory is taken for it: these claims begin at 2^60 bytes, and what
    # is really read are 271 short strings and 41 names.
    assert peak < 1e6


@given(st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_a_file_that_is_cut_off(path, share):
    # The last tensor begins here; what comes after it is padding.
    tensor = list(GGUFFile.open(path).tensors.values())[-1]
    copy = path.with_name("cut.gguf")
    copy.write_bytes(path.read_bytes()[: int(share * (tensor.offset + 4 * files.WIDTH - 1))])
    with pytest.raises(CheckpointError, match=r"cut\.gguf cannot be loaded: it (is cut|does not)"):
        load(copy)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_a_file_with_wrong_bytes_loads_or_is_refused(path, changes):
    data = bytearray(path.read_bytes())
    header = GGUFFile.open(path).tensors["token_embd.weight"].offset
    for place, byte in changes:
        data[int(place * (header - 1))] = byte
    copy = path.with_name("wrong.gguf")
    copy.write_bytes(data)
    try:
        model, _ = load(copy)
    except CheckpointError as error:
        assert str(error).startswith(f"{copy} cannot be loaded: ")
    else:
        assert model.embedding.weight.shape == (len(files.TOKENS), files.WIDTH)
