"""Folders in the layout of Hugging Face: configs of every kind and age, and their weights."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import upstream
from hypothesis import given, settings
from hypothesis import strategies as st

import equigemma as eg
from equigemma import describe
from equigemma.checkpoint import CheckpointError, load_config, load_model
from equigemma.checkpoint.core._layout import split_layout
from equigemma.checkpoint.hf import _read as _hf
from equigemma.checkpoint.hf._config import read_config
from equigemma.checkpoint.hf._config_write import write_config
from equigemma.config import ModelConfig


safetensors_numpy = pytest.importorskip(
    "safetensors.numpy", reason='needs pip install "equigemma[hf]"'
)
pytest.importorskip("tokenizers", reason='needs pip install "equigemma[hf]"')


def variant(name: str, vocab: int) -> ModelConfig:
    return split_layout(replace(eg.variants.get(name), vocab=vocab))


# What published files say, in the words of the release that they were made with.

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
}
GEMMA1_7B = COMMON | {
    "architectures": ["GemmaForCausalLM"],
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "vocab_size": 256000,
}
GEMMA2_2B = COMMON | {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.4",
    "vocab_size": 256000,
}
GEMMA2_2B_NEW = {
    key: value for key, value in GEMMA2_2B.items() if key not in ("rope_theta", "torch_dtype")
} | {
    "dtype": "bfloat16",
    "layer_types": ["sliding_attention", "full_attention"] * 13,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
    "use_bidirectional_attention": None,
}
GEMMA3_1B = COMMON | {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vocab_size": 262144,
}
GEMMA3_270M_NEW = COMMON | {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "dtype": "bfloat16",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_parameters": {
        "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
# Keys that have the default value were left out in the first multimodal files.
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
GEMMA3_27B = GEMMA3_4B | {
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    }
}
PUBLISHED = [
    (GEMMA1_7B, "gemma1-7b", 256_000),
    (GEMMA2_2B, "gemma2-2b", 256_000),
    (GEMMA2_2B_NEW, "gemma2-2b", 256_000),
    (GEMMA3_270M_NEW, "gemma3-270m", 262_144),
    (GEMMA3_1B, "gemma3-1b", 262_144),
    (GEMMA3_4B, "gemma3-4b", 262_208),
    (GEMMA3_27B, "gemma3-27b", 262_208),
]


@pytest.mark.parametrize(("data", "name", "vocab"), PUBLISHED)
def test_published_configs(data, name, vocab):
    assert read_config(json.loads(json.dumps(data))) == variant(name, vocab)


@pytest.mark.parametrize("name", eg.variants.names())
def test_every_variant_can_be_described(name):
    config = eg.variants.get(name)
    if name.startswith("gemma3n"):
        with pytest.raises(CheckpointError, match="caps the logits of every Gemma 3n"):
            write_config(config)
        config = replace(config, final_softcap=30.0)
    data = write_config(config, context_length=1009)
    assert data.get("text_config", data)["max_position_embeddings"] == 1009
    assert read_config(json.loads(json.dumps(data))) == split_layout(config)


@pytest.mark.parametrize("name", formats.CONFIGS)
def test_both_generations_of_readers_find_their_rotary_options(name):
    data = write_config(formats.CONFIGS[name])
    new = [key for key in data if key == "rope_parameters"]
    old = [key for key in data if key in ("rope_theta", "rope_scaling", "rope_local_base_freq")]
    assert new and old
    for dropped in (new, old):
        rest = {key: value for key, value in data.items() if key not in dropped}
        assert read_config(rest) == formats.CONFIGS[name], describe(read_config(rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; the known ones are gemma, gemma2, gem"),
        ({"model_type": ["gemma"]}, "model_type is a list; the known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is an object; only None is"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is an object; only {} and None are"),
        ({"per_layer_config": {}, "novel": 1}, "not supported: novel, per_layer_config"),
        ({"attention_bias": True}, "attention_bias is True; only False is supported"),
        ({"attention_bias": 0}, "attention_bias is 0; only False is supported"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0.0 and None are"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'; only 'gelu_pytorch_tanh'"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings must be true or false, got None"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings must be true or false, got 0"),
        ({"use_bidirectional_attention": "some"}, "use_bidirectional_attention must be true or"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; only null"),
        ({"hidden_size": 0}, "hidden_size must be a whole number from 1 up, got 0"),
        ({"hidden_size": 10**40}, r"hidden_size must be below 2\*\*53, got a huge number"),
        ({"hidden_size": "640"}, "hidden_size must be a number, got '640'"),
        ({"hidden_size": None}, "hidden_size must be a number, got None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number, got nan"),
        ({"rms_norm_eps": 0.0}, "describes no valid model. NormConfig.epsilon must be positive"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776; no model has so"),
        ({"num_key_value_heads": 3}, "must divide the number of query heads; got 3 and 4"),
        ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar must be positive, got -1"),
        ({"layer_types": ["full_attention"]}, "list with an entry for each of 18"),
        ({"layer_types": ["chunked_attention"] * 18}, "layer_types name 'chunked_attention'"),
        ({"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern must be"),
        ({"sliding_window": None}, "sliding_window must be a number, got None"),
        ({"rope_theta": 5}, "rope_theta is 1000000.0, and an older key says 5"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            "rope_parameters hold rope_type and factor for all layers at once, which transformers",
        ),
        (
            {"rope_parameters": {"beta_fast": 1}},
            r"not supported: rope_parameters\.beta_fast",
        ),
        ({"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
            "rope_type is 'yarn', with a factor of 2.0; only 'default' with 1.0, 'linear' and",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "factor": 2.0}}},
            "rope_type is 'default', with a factor of 2.0",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 0.5}}},
            "RopeConfig.scale must be at least 1, got 0.5",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"beta_fast": 1}}},
            r"not supported: rope_parameters\.sliding_attention\.beta_fast",
        ),
    ],
)
def test_an_option_that_is_not_supported(change, message):
    with pytest.raises(CheckpointError, match=message):
        read_config(GEMMA3_270M_NEW | change)


def test_options_around_a_text_model():
    with pytest.raises(CheckpointError, match="not supported: audio_config"):
        read_config(GEMMA3_4B | {"audio_config": {}})
    # What stands around the text model counts.
    text = GEMMA3_4B["text_config"] | {"tie_word_embeddings": False}
    assert read_config(GEMMA3_4B | {"text_config": text}).lm_head == "tied"
    assert read_config(GEMMA3_4B | {"tie_word_embeddings": False}).lm_head == "untied"
    with pytest.raises(CheckpointError, match=r"text_config.model_type is 'gemma2'"):
        read_config(GEMMA3_4B | {"text_config": {"model_type": "gemma2"}})


def test_models_that_no_config_json_describes():
    base = formats.CONFIGS["gemma3"]
    first = base.layers[0]
    other = replace(first, attention=replace(first.attention, window=3))
    with pytest.raises(CheckpointError, match=r"layers\[1\]\.attention\.window: 5, not 3"):
        write_config(replace(base, layers=(first, other)))
    scaled = replace(first, attention=replace(first.attention, query_scale=0.3))
    with pytest.raises(CheckpointError, match=r"layers\[0\]\.attention\.query_scale: .*, not 0\.3"):
        write_config(replace(base, layers=(scaled,)))


# Weights.


def names(params: dict[str, np.ndarray], transposed_gate: bool, has_post_norms: bool) -> dict:
    """DeepMind's parameters under the names of transformers, matrices as torch has them."""
    arrays = {
        "embed_tokens.weight": params["embedder/input_embedding"],
        "norm.weight": params["final_norm/scale"],
    }
    norms = {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_ffw_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn/_query_norm": "self_attn.q_norm",
        "attn/_key_norm": "self_attn.k_norm",
    }
    if not has_post_norms:
        norms["pre_ffw_norm"] = "post_attention_layernorm"
    for index in range(sum(name.endswith("mlp/linear") for name in params)):
        ours, theirs = f"layer_{index}/", f"layers.{index}."
        for name, their_name in norms.items():
            if f"{ours}{name}/scale" in params:
                arrays[f"{theirs}{their_name}.weight"] = params[f"{ours}{name}/scale"]
        if f"{ours}attn/qkv_einsum/w" in params:
            q, k, v = params[f"{ours}attn/qkv_einsum/w"]
        else:
            q, (k, v) = params[f"{ours}attn/q_einsum/w"], params[f"{ours}attn/kv_einsum/w"]
        for name, heads in (("q", q), ("k", k), ("v", v)):
            arrays[f"{theirs}self_attn.{name}_proj.weight"] = np.concatenate(
                [head.T for head in heads]
            )
        output = params[f"{ours}attn/attn_vec_einsum/w"]
        arrays[f"{theirs}self_attn.o_proj.weight"] = np.concatenate(list(output)).T
        gates = params[f"{ours}mlp/gating_einsum"]
        for name, gate in zip(("gate", "up"), gates, strict=True):
            arrays[f"{theirs}mlp.{name}_proj.weight"] = gate if transposed_gate else gate.T
        arrays[f"{theirs}mlp.down_proj.weight"] = params[f"{ours}mlp/linear"].T
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def write(
    folder: Path, config: ModelConfig, arrays: dict[str, np.ndarray], prefix: str = "model."
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(write_config(config)))
    named = {prefix + name: array for name, array in arrays.items()}
    safetensors_numpy.save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2_gqa", "gemma2_mha", "gemma3"])
def test_numbers_of_deepmind_through_a_folder(name, tmp_path):
    golden = upstream.golden(name)
    with np.load(upstream.GOLDEN / f"{name}.npz") as file:
        params = {
            key.removeprefix("params/"): file[key] for key in file if key.startswith("params/")
        }
    ffw = golden.model.config.layers[0].ffw
    arrays = names(params, ffw.gate_axes == "CFD", has_post_norms=True)
    model = load_model(write(tmp_path / "x", golden.model.config, arrays), dtype=jnp.float32)
    assert model.config == split_layout(golden.model.config)
    tokens = jnp.asarray(golden["cached_tokens"])
    # The same numbers, summed by a program of another layout.
    np.testing.assert_allclose(
        formats.logits(model, tokens), formats.logits(golden.model, tokens), atol=2e-5
    )


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """The weights of the tiny Gemma 3 under the names of transformers."""
    from equigemma.checkpoint.gemma._params import to_params

    flat: dict[str, np.ndarray] = {}

    def flatten(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                flatten(value, f"{prefix}{key}/")
            else:
                flat[prefix + key] = np.asarray(value)

    flatten(to_params(formats.model(GEMMA3)))
    return names(flat, transposed_gate=True, has_post_norms=True)


GEMMA3 = formats.CONFIGS["gemma3"]


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("", ()),
        ("model.", ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")),
        (
            "language_model.model.",
            (
                "language_model.lm_head.weight",
                "vision_tower.vision_model.embeddings.patch_embedding.weight",
                "multi_modal_projector.mm_input_projection_weight",
            ),
        ),
        (
            "model.language_model.",
            (
                "lm_head.weight",
                "model.vision_tower.vision_model.post_layernorm.bias",
                "model.multi_modal_projector.mm_soft_emb_norm.weight",
            ),
        ),
        ("language_model.", ("vision_tower.x", "multi_modal_projector.x")),
    ],
)
def test_every_prefix_and_what_may_stand_beside(prefix, others, arrays, tmp_path):
    folder = write(tmp_path, GEMMA3, arrays, prefix)
    every = safetensors_numpy.load_file(folder / "model.safetensors")
    embedding = every[f"{prefix}embed_tokens.weight"]
    every |= {
        name: embedding.copy() if "lm_head" in name else np.ones((3, 2), np.float32)
        for name in others
    }
    safetensors_numpy.save_file(every, folder / "model.safetensors")
    formats.assert_same(load_model(folder, dtype=jnp.float32), formats.model(GEMMA3))
    assert load_config(folder) == GEMMA3


@pytest.mark.parametrize("stored", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, jnp.bfloat16])
def test_dtypes(stored, wanted, arrays, tmp_path):
    folder = write(tmp_path, GEMMA3, {name: array.astype(stored) for name, array in arrays.items()})
    model = load_model(folder, dtype=wanted)
    expected = formats.model(GEMMA3)
    for leaf, exact in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        rounded = np.asarray(exact).astype(stored).astype(wanted)
        assert leaf.dtype == wanted
        np.testing.assert_array_equal(np.asarray(leaf), rounded)


def shard(folder: Path, arrays: dict[str, np.ndarray], count: int = 3) -> dict:
    """The weights spread over files, and the index that says where they are."""
    write(folder, GEMMA3, {})
    (folder / "model.safetensors").unlink()
    named = {f"model.{name}": array for name, array in arrays.items()}
    weight_map = {}
    for index in range(count):
        part = dict(list(named.items())[index::count])
        file = f"model-{index + 1:05}-of-{count:05}.safetensors"
        safetensors_numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_several_files(arrays, tmp_path):
    shard(tmp_path, arrays)
    calls = []
    model = load_model(tmp_path, dtype=jnp.float32, progress=lambda *call: calls.append(call))
    formats.assert_same(model, formats.model(GEMMA3))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert [call[1] for call in calls] == [total] * len(jax.tree.leaves(model))
    assert calls[-1][0] == total
    assert calls[0][2] == "embedding.weight"
    assert [call[0] for call in calls] == sorted({call[0] for call in calls})


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../model.safetensors", "no .safetensors beside it: '../model.safetensors'"),
        ("/etc/passwd", "no .safetensors beside it: '/etc/passwd'"),
        ("..\\x.safetensors", "no .safetensors beside it"),
        ("C:x.safetensors", "no .safetensors beside it"),
        ("", "no .safetensors beside it: ''"),
        (7, "no .safetensors beside it: 7"),
        ("gone.safetensors", r"cannot be (read|loaded): .*(No such file|gone)"),
        ("model-00002-of-00003.safetensors", "has model.embed_tokens.weight, which it has not"),
    ],
)
def test_an_index_that_lies(file, message, arrays, tmp_path):
    index = shard(tmp_path, arrays)
    index["weight_map"]["model.embed_tokens.weight"] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_tensor_in_two_files(arrays, tmp_path):
    shard(tmp_path, arrays, count=2)
    first = tmp_path / "model-00001-of-00002.safetensors"
    twice = safetensors_numpy.load_file(first)
    twice["model.norm.weight"] = arrays["norm.weight"]
    safetensors_numpy.save_file(twice, first)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in two of its files"):
        load_model(tmp_path)


def test_all_differences_at_once(arrays, tmp_path):
    changed = dict(arrays)
    del changed["layers.1.self_attn.k_proj.weight"]
    changed["extra.weight"] = np.ones(2, np.float32)
    changed["layers.0.mlp.up_proj.weight"] = np.ones((3, 2), np.float32)
    with pytest.raises(CheckpointError) as caught:
        load_model(write(tmp_path, GEMMA3, changed))
    for line in (
        f"{tmp_path} cannot be loaded: The weights do not fit the model, 3 difference(s)",
        "model.layers.1.self_attn.k_proj.weight: missing",
        "model.extra.weight: not a part of this model",
        "model.layers.0.mlp.up_proj.weight: expected shape [17, 28], got [3, 2]",
    ):
        assert line in str(caught.value)


def test_weights_that_are_no_numbers_to_compute_with(arrays, tmp_path):
    changed = arrays | {"norm.weight": np.ones(formats.WIDTH, np.int8)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as I8; weights are"):
        load_model(write(tmp_path, GEMMA3, changed))


def test_a_config_that_claims_more_than_the_weights(arrays, tmp_path):
    folder = write(tmp_path, GEMMA3, arrays)
    data = write_config(GEMMA3)
    for change, message in (
        ({"num_hidden_layers": 997, "layer_types": None}, "claims 997 layers, and there are"),
        ({"vocab_size": 2**40}, "describes a weight of .* numbers, and the largest"),
    ):
        (folder / "config.json").write_text(json.dumps(data | change))
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)


def test_pickled_weights_are_not_touched(arrays, tmp_path):
    folder = write(tmp_path, GEMMA3, arrays)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"are pickled, and can run any code"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_a_config_that_is_no_json(content, arrays, tmp_path):
    folder = write(tmp_path, GEMMA3, arrays)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: it (is not|holds no)"):
        load_model(folder)


@pytest.fixture(scope="module")
def fragile(arrays, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("fragile") / "x", GEMMA3, arrays)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_damaged_file_loads_or_is_refused(fragile, data):
    whole = safetensors_numpy.save(safetensors_numpy.load_file(fragile / "model.safetensors"))
    header = 8 + int.from_bytes(whole[:8], "little")
    copy = fragile.with_name("damaged")
    copy.mkdir(exist_ok=True)
    (copy / "config.json").write_bytes((fragile / "config.json").read_bytes())
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.integers(0, len(changed)))]
    (copy / "model.safetensors").write_bytes(changed)
    try:
        model = load_model(copy, dtype=jnp.float32)
    except CheckpointError as error:
        assert str(error).startswith(f"{copy} cannot be")
    else:
        assert model.embedding.weight.shape == (formats.VOCAB, formats.WIDTH)


def test_a_file_that_changes_while_it_is_read(arrays, tmp_path):
    folder = write(tmp_path, GEMMA3, arrays)
    opened = _hf.open_folder(folder)
    changed = arrays | {"norm.weight": np.ones(3, np.float32)}
    write(folder, GEMMA3, changed)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was read"):
        np.asarray(opened.model.final_norm.scale)


# Where weights go.


def test_weights_go_where_they_are_told(arrays, tmp_path):
    folder = write(tmp_path, GEMMA3, arrays)
    device = jax.devices()[0]
    mesh = jax.sharding.Mesh([device], ("width",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = load_model(folder, sharding=spread)
    assert {leaf.sharding for leaf in jax.tree.leaves(model)} == {spread}
    model = load_model(folder, sharding=device)
    assert {leaf.devices() == {device} for leaf in jax.tree.leaves(model)} == {True}
    tree = jax.tree.map(lambda _: spread, model)
    loaded = load_model(folder, sharding=tree)
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {spread}
    with pytest.raises(ValueError, match="sharding must be a device, a jax.sharding.Sharding"):
        load_model(folder, sharding=(spread, spread))


SHARDED = """
    import sys, jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from equigemma.checkpoint import load_model

    mesh = jax.sharding.Mesh(jax.devices(), ("width",))
    rows = NamedSharding(mesh, PartitionSpec("width"))
    model = load_model(sys.argv[1], dtype="float32")
    tree = jax.tree.map(lambda leaf: rows if leaf.shape[0] % 2 == 0 else mesh.devices[0], model)
    halves = load_model(sys.argv[1], dtype="float32", sharding=tree)
    split = [len(leaf.devices()) for leaf in jax.tree.leaves(halves)]
    same = [
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(halves), strict=True)
    ]
    print(min(split), max(split), all(same))
"""


def python(script: str, *arguments, **environment) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own."""
    import os

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_weights_are_spread_over_devices(arrays, tmp_path):
    folder = write(tmp_path, GEMMA3, arrays)
    flags = "--xla_force_host_platform_device_count=2"
    assert python(SHARDED, folder, XLA_FLAGS=flags).stdout.split() == ["1", "2", "True"]


# Memory.

WRITE_LARGE = """
    import json, struct, sys
    from pathlib import Path
    import numpy as np
    from equigemma.checkpoint.hf._rules import rules
    from equigemma.checkpoint.hf._config import read_config
    from equigemma.checkpoint.core._keymap import leaf_shapes, plan
    from equigemma.checkpoint.core._skeleton import skeleton

    folder = Path(sys.argv[1])
    config = read_config(json.loads((folder / "config.json").read_text()))
    header, at = {}, 0
    for entry in plan(leaf_shapes(skeleton(config)), rules(config)):
        for key in entry.keys:
            size = 4 * int(np.prod(entry.key_shape))
            header[key] = {
                "dtype": "F32", "shape": list(entry.key_shape), "data_offsets": [at, at + size]
            }
            at += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        # All zeros, without a block on disk.
        file.truncate(file.tell() + at)
"""
LOAD_LARGE = """
    import sys, jax
    from equigemma.checkpoint import load_model

    def peak():
        lines = open("/proc/self/status").read().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    jax.block_until_ready(jax.numpy.ones(3))
    load_model(sys.argv[2], dtype="float32")
    before = peak()
    model = load_model(sys.argv[1], dtype=sys.argv[3])
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(model)]
    print(sum(sizes), max(sizes), peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    data = GEMMA3_270M_NEW | {"num_hidden_layers": 26, "layer_types": None, "vocab_size": 32_768}
    (folder / "config.json").write_text(json.dumps(data))
    python(WRITE_LARGE, folder)
    assert (folder / "model.safetensors").stat().st_size > 6e8
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to see the peak")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_large_checkpoint(dtype, arrays, large, tmp_path):
    small = write(tmp_path / "small", GEMMA3, arrays)
    model, largest, extra = map(int, python(LOAD_LARGE, large, small, dtype).stdout.split())
    assert model > (6e8 if dtype == "float32" else 3e8)
    # Two of the largest weights, and 5 % for what else a process takes on the way.
    assert extra < 1.05 * model + 2 * largest
