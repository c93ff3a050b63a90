"""Configs of the installed `transformers`: every kind that it writes, every form of an option.

What is taken for a key without effect has none there: logits stay the same bits.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from equigemma.checkpoint import CheckpointError, load_config, load_model
from equigemma.checkpoint.hf._config import read_config
from equigemma.checkpoint.hf._without_effect import FIXED, WITHOUT_EFFECT
from equigemma.config import KeyIsValueConfig, SharedKVConfig


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


# Both sum in float32 in orders of their own; logits reach 30, layers are up to 7.
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-4)
SIZES = dict(
    vocab_size=61,
    hidden_size=28,
    intermediate_size=17,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
)
WINDOW = dict(sliding_window=5)
PER_LAYER = dict(vocab_size_per_layer_input=61, hidden_size_per_layer_input=6)
STREAMS = (
    SIZES
    | WINDOW
    | PER_LAYER
    | dict(
        laurel_rank=3,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.5, *[0.0] * 5],
    )
)
LOCAL, GLOBAL = "sliding_attention", "full_attention"
SHARED = dict(
    num_kv_shared_layers=2,
    use_double_wide_mlp=True,
    layer_types=[LOCAL, GLOBAL] * 2 + [LOCAL, GLOBAL],
)
LARGE = dict(
    attention_k_eq_v=True,
    num_global_key_value_heads=1,
    hidden_size_per_layer_input=0,
    layer_types=[LOCAL, LOCAL, GLOBAL] * 2,
)
EXPERTS = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=5)
FOUR = SIZES | WINDOW | PER_LAYER | dict(global_head_dim=20)


def kinds() -> dict:
    t = transformers
    return {
        "gemma": lambda: t.GemmaConfig(**SIZES),
        "gemma2": lambda: t.Gemma2Config(**SIZES, **WINDOW),
        "gemma3": lambda: t.Gemma3TextConfig(**SIZES, **WINDOW),
        "gemma3n": lambda: t.Gemma3nTextConfig(**STREAMS),
        "gemma4": lambda: t.Gemma4TextConfig(**FOUR, layer_types=[LOCAL, LOCAL, GLOBAL] * 2),
        "gemma4, shared keys": lambda: t.Gemma4TextConfig(**FOUR | SHARED),
        "gemma4, keys are values": lambda: t.Gemma4TextConfig(**FOUR | LARGE),
        "gemma4, experts": lambda: t.Gemma4TextConfig(**FOUR | LARGE | EXPERTS),
        "gemma4, heads alike": lambda: t.Gemma4TextConfig(
            **FOUR | dict(global_head_dim=10, layer_types=[LOCAL, GLOBAL] * 3)
        ),
        "gemma4 unified": lambda: t.Gemma4UnifiedTextConfig(
            **{k: v for k, v in (FOUR | LARGE).items() if k not in PER_LAYER}
        ),
    }


def build(config):
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
            elif "norm" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(3, 61, (2, 13))


def of_theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens()), use_cache=False).logits.numpy()


def of_folder(folder: Path) -> np.ndarray:
    return of_theirs(
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager"
        ).eval()
    )


def of_ours(folder: Path) -> np.ndarray:
    model = load_model(folder, dtype="float32")
    return np.asarray(tiny.run(model, tiny.host(tokens(), np.int32)).logits)


@pytest.mark.parametrize("name", kinds())
def test_every_kind_that_they_write(name, tmp_path):
    theirs = build(kinds()[name]())
    theirs.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["transformers_version"] == transformers.__version__
    assert ("per_layer_config" in told) is name.startswith("gemma4")
    assert "global_head_dim" not in told
    expected = of_theirs(theirs)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(of_ours(tmp_path), expected, **CLOSE)
    # With every default written out it is the same model.
    whole = json.loads(theirs.config.to_json_string(use_diff=False))
    assert read_config(whole) == load_config(tmp_path)


def test_what_layers_have_of_their_own():
    config = read_config(json.loads(kinds()["gemma4, keys are values"]().to_json_string()))
    far, near = config.layers[2].attention, config.layers[0].attention
    assert (far.head_dim, far.kv) == (20, KeyIsValueConfig(heads=1)) and near.head_dim == 10
    shared = kinds()["gemma4, shared keys"]()
    config = read_config(json.loads(shared.to_json_string()))
    assert shared.kv_sharing_modes == [None, None, "store", "store", "reuse", "reuse"]
    owners = [
        layer.attention.kv.layer
        for layer in config.layers
        if isinstance(layer.attention.kv, SharedKVConfig)
    ]
    assert owners == [2, 3]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma3", {"1": {"intermediate_size": 23}}),
        ("gemma3", {"2": {"sliding_window": 3}}),
        ("gemma4", {"0": {"head_dim": 20}, "2": {"head_dim": 20}, "5": {"head_dim": 20}}),
        ("gemma4", {"2": {"head_dim": 20, "intermediate_size": 23}, "5": {"head_dim": 20}}),
        ("gemma4", {"0": {"skip": ["mlp"]}}),
    ],
)
def test_layers_of_their_own_that_are_not_supported(name, changes):
    data = json.loads(kinds()[name]().to_json_string())
    with pytest.raises(CheckpointError, match="per_layer_config"):
        read_config(data | {"per_layer_config": changes})


# Rotary options: what is left of each form when they have read it.

LINEAR = {"rope_type": "linear", "factor": 8.0}
FORMS = {
    "nothing": {},
    "old keys": dict(rope_theta=3e5, rope_scaling=LINEAR, rope_local_base_freq=7777.0),
    "old keys of old names": dict(rope_theta=3e5, rope_scaling={"type": "linear", "factor": 4.0}),
    "one base": dict(rope_theta=3e5),
    "flat": dict(rope_parameters=LINEAR | {"rope_theta": 3e5}),
    "flat, as it is anyway": dict(
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}
    ),
    "nested": dict(
        rope_parameters={GLOBAL: LINEAR | {"rope_theta": 3e5}, LOCAL: {"rope_theta": 7777.0}}
    ),
    "half of it nested": dict(rope_parameters={GLOBAL: LINEAR | {"rope_theta": 3e5}}),
    "nested, with an old base": dict(
        rope_parameters={GLOBAL: {"type": "linear", "factor": 8.0}}, rope_theta=3e5
    ),
    "nothing in it": dict(
        rope_parameters={GLOBAL: {"rope_type": "default"}, LOCAL: {"rope_type": "default"}}
    ),
}
REFUSED_FORMS = {
    *((name, "flat") for name in ("gemma3", "gemma3n")),
    *((name, "old keys") for name in ("gemma", "gemma2")),
}


def their_ropes(config) -> set[tuple[str, float, float]]:
    """Kind of layer, base and factor."""
    told = config.rope_parameters
    kinds = getattr(config, "layer_types", None) or [GLOBAL]
    found = {kind: told[kind] if kind in told else told for kind in kinds}
    return {
        (kind, float(rope["rope_theta"]), float(rope.get("factor", 1.0)))
        for kind, rope in found.items()
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "gemma3n"])
def test_forms_of_rotary_options(name, form):
    data = json.loads(kinds()[name]().to_json_string())
    del data["rope_parameters"]
    data |= copy.deepcopy(FORMS[form])
    nested = GLOBAL in data.get("rope_parameters", {})
    if nested and name in ("gemma", "gemma2") or (name, form) in REFUSED_FORMS:
        # They leave what they do not expect there unread; here it is said.
        with pytest.raises(CheckpointError, match="rope_parameters|rope_local_base_freq"):
            read_config(data)
        return
    theirs = type(kinds()[name]())(**copy.deepcopy(data))
    config = read_config(data)
    found = {
        (
            LOCAL if layer.attention.window else GLOBAL,
            layer.attention.rope.theta,
            layer.attention.rope.scale,
        )
        for layer in config.layers
    }
    assert found == their_ropes(theirs)


# Keys without effect.

# They would be followed to other files, or refused because of their types.
NOT_HERE = {"model_type", "transformers_version", "architectures", "dtype", "torch_dtype"}
VALUES: dict[str, Any] = {
    "problem_type": "regression",
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "num_labels": 1,
    "output_hidden_states": True,
    "tie_last_hidden_states": True,
    "max_position_embeddings": 7,
    "chunk_size_feed_forward": 1,
    "cache_implementation": "hybrid",
    "bos_token_id": 5,
    "eos_token_id": [5, 6],
    "pad_token_id": 0,
    "initializer_range": 0.5,
    "tokenizer_class": "GemmaTokenizer",
    "pretraining_tp": 2,
    "temperature": 0.3,
    "torchscript": True,
    "name_or_path": "x/y",
    "use_cache": False,
    "gradient_checkpointing": False,
}


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma4"])
def test_keys_without_effect_have_none(name, tmp_path):
    build(kinds()[name]()).save_pretrained(tmp_path)
    expected = of_folder(tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    refused = {"attn_implementation", "experts_implementation", "output_attentions", "return_dict"}
    refused |= {key for key in WITHOUT_EFFECT if key.startswith("_")} | NOT_HERE | {"is_decoder"}
    for key in sorted(WITHOUT_EFFECT - refused):
        told[key] = VALUES.get(key, 3)
    for key, values in FIXED.items():
        if key not in told:
            told[key] = values[0]
    # A layer's worth of options that they have as fields must be of their type.
    told |= {"is_encoder_decoder": False}
    path.write_text(json.dumps(told))
    np.testing.assert_array_equal(of_folder(tmp_path), expected)
    np.testing.assert_allclose(of_ours(tmp_path), expected, **CLOSE)
