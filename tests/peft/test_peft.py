"""Adapters in PEFT's files: the format by hand, round trips, and what is refused.

That `peft` itself computes the same from them is shown in `parity/test_peft.py`.
"""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma import lora, peft, quantize
from equigemma.checkpoint import CheckpointError


safetensors = pytest.importorskip("safetensors.numpy", reason="files of PEFT are the extra `hf`")

CONFIGS = {name: config for name, config in tiny.CONFIGS.items() if "experts" not in name}
ROOT = "base_model.model.model.layers"


def adapted(config=tiny.GEMMA3, rank: int = 3, **options):
    """A model with random numbers in its adapters, as if they had learned."""
    model = lora.add(tiny.model(config), rank=rank, alpha=5.0, key=jax.random.key(0), **options)
    rng = np.random.default_rng(1)
    adapters, rest = lora.split(model)
    adapters = jax.tree.map(
        lambda leaf: tiny.host(rng.normal(size=leaf.shape) * 0.3, leaf.dtype), adapters
    )
    return eqx.combine(adapters, rest)


def read(folder):
    return json.loads((folder / peft.CONFIG).read_text()), safetensors.load_file(
        folder / peft.WEIGHTS
    )


def rewrite(folder, tensors=None, **changes):
    config, before = read(folder)
    (folder / peft.CONFIG).write_text(json.dumps(config | changes))
    safetensors.save_file(before if tensors is None else tensors, folder / peft.WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_again(tmp_path, name, kind):
    model = adapted(CONFIGS[name], kind=kind)
    peft.save(model, tmp_path / "a")
    back = peft.load(tiny.model(CONFIGS[name]), tmp_path / "a")
    assert eqx.tree_equal(back, model)


def test_the_files_are_those_of_the_documented_format(tmp_path):
    model = adapted()
    peft.save(model, tmp_path / "a", base="somebody/a-model")
    config, tensors = read(tmp_path / "a")
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (3, 5, False)
    assert config["base_model_name_or_path"] == "somebody/a-model"
    attention, ffw = [f"{letter}_proj" for letter in "koqv"], ["down_proj", "gate_proj", "up_proj"]
    assert config["target_modules"] == sorted([*attention, *ffw])
    assert len(tensors) == 2 * 7 * 2

    layer = model.layers[1]
    kv, output = layer.attention.projection.kv, layer.attention.output
    # A is [r, inputs], B [outputs, r]; heads come before their numbers.
    v_down, v_up = (tensors[f"{ROOT}.1.self_attn.v_proj.lora_{x}.weight"] for x in "AB")
    np.testing.assert_array_equal(v_down, kv.down[1].T)
    np.testing.assert_array_equal(v_up, np.asarray(kv.up[1]).reshape(3, 30).T)
    o_down = tensors[f"{ROOT}.1.self_attn.o_proj.lora_A.weight"]
    np.testing.assert_array_equal(o_down, np.asarray(output.down).reshape(60, 3).T)
    gate_up = tensors[f"{ROOT}.0.mlp.up_proj.lora_B.weight"]
    np.testing.assert_array_equal(gate_up, model.layers[0].ffw.gate.up[1].T)


def test_places_and_ranks_that_differ_are_named_in_full(tmp_path):
    def first_output(path, einsum):
        return path == "layers.0.attention.output"

    def last_output(path, einsum):
        return path == "layers.1.attention.output"

    model = lora.add(tiny.model(tiny.GEMMA3), rank=2, key=jax.random.key(0), where=first_output)
    model = lora.add(model, rank=5, alpha=3.0, key=jax.random.key(1), where=last_output)
    peft.save(model, tmp_path / "a")
    config, _ = read(tmp_path / "a")
    second = "model.layers.1.self_attn.o_proj"
    assert config["rank_pattern"] == {second: 5}
    assert config["alpha_pattern"] == {second: 3}
    assert eqx.tree_equal(peft.load(tiny.model(tiny.GEMMA3), tmp_path / "a"), model)

    only = lora.add(tiny.model(tiny.GEMMA3), rank=2, key=jax.random.key(0), where=first_output)
    peft.save(only, tmp_path / "a")
    assert read(tmp_path / "a")[0]["target_modules"] == ["model.layers.0.self_attn.o_proj"]


def test_of_keys_and_values_one_may_be_adapted_alone(tmp_path):
    model = adapted()
    peft.save(model, tmp_path / "a")
    _, tensors = read(tmp_path / "a")
    rewrite(tmp_path / "a", {name: part for name, part in tensors.items() if "v_proj" in name})
    found = lora.adapters(peft.load(tiny.model(tiny.GEMMA3), tmp_path / "a"))
    assert list(found) == [f"layers.{index}.attention.projection.kv" for index in range(2)]
    kv = found["layers.0.attention.projection.kv"]
    assert not kv.down[0].any() and not kv.up[0].any()
    np.testing.assert_array_equal(kv.up[1], model.layers[0].attention.projection.kv.up[1])


def test_parts_of_other_ranks_and_strengths_become_one_adapter(tmp_path):
    model = adapted()
    peft.save(model, tmp_path / "a")
    _, tensors = read(tmp_path / "a")
    name = f"{ROOT}.0.self_attn.v_proj.lora_"
    tensors[f"{name}A.weight"] = tensors[f"{name}A.weight"][:2]
    tensors[f"{name}B.weight"] = np.ascontiguousarray(tensors[f"{name}B.weight"][:, :2])
    module = "layers.0.self_attn.v_proj"
    rewrite(tmp_path / "a", tensors, alpha_pattern={module: 8}, rank_pattern={module: 2})
    read_kv = peft.load(tiny.model(tiny.GEMMA3), tmp_path / "a").layers[0].attention.projection.kv
    written_kv = model.layers[0].attention.projection.kv
    change, before = (
        np.asarray(adapter.scale * lora.product(adapter.eqn, adapter.down, adapter.up))
        for adapter in (read_kv, written_kv)
    )
    np.testing.assert_allclose(change[0], before[0], atol=1e-6)
    down, up = np.asarray(written_kv.down[1])[:, :2], np.asarray(written_kv.up[1])[:2]
    # A sum of two products of about 1, in float32.
    np.testing.assert_allclose(change[1], 8 / 2 * np.einsum("dr,rkh->kdh", down, up), atol=1e-5)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_names_of_models_with_towers_are_known(tmp_path, prefix):
    model = adapted()
    peft.save(model, tmp_path / "a")
    _, tensors = read(tmp_path / "a")
    start = "base_model.model."
    renamed = {
        k.replace(f"{start}model.", f"{start}{prefix}", 1): part for k, part in tensors.items()
    }
    rewrite(tmp_path / "a", renamed, use_rslora=True, lora_alpha=5 / 3**0.5)
    back = peft.load(tiny.model(tiny.GEMMA3), tmp_path / "a")
    for ours, read_again in zip(jax.tree.leaves(model), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(ours, read_again)
    assert lora.adapters(back)["layers.0.ffw.down"].scale == pytest.approx(5 / 3)


def test_adapters_over_8_bit_weights_are_written_too(tmp_path):
    model = adapted()
    peft.save(quantize.int8(model), tmp_path / "a")
    assert eqx.tree_equal(peft.load(tiny.model(tiny.GEMMA3), tmp_path / "a"), model)


def test_what_cannot_be_written_is_named(tmp_path):
    plain = tiny.model(tiny.GEMMA3)
    with pytest.raises(CheckpointError, match="the model has no adapters"):
        peft.save(plain, tmp_path / "a")
    with pytest.raises(CheckpointError, match="layers.0.ffw.experts.down: PEFT adapts linear maps"):
        peft.save(adapted(tiny.GEMMA4_MOE), tmp_path / "a")
    twice = lora.add(adapted(), rank=2, key=jax.random.key(1), nested=True)
    with pytest.raises(CheckpointError, match="one adapter is around another"):
        peft.save(twice, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="holds thesis.txt, which is no part"):
        peft.save(adapted(), tmp_path / "b")
    assert not (tmp_path / "a").exists()


KEY = f"{ROOT}.0.self_attn.q_proj.lora_"
Q_MISSING = {f"{KEY}A.weight": None, f"{KEY}B.weight": None}


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, "its peft_type is 'IA3'; only LORA"),
        ({"bias": "some"}, {}, "its bias is 'some', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, {}, "its modules_to_save name lm_head, which it does"),
        ({"trainable_token_indices": [3]}, {}, "trainable_token_indices name embed_tokens, and it"),
        ({"trainable_token_indices": [3, 3]}, {}, "must be ids, each of them once"),
        ({"novel_config": {"x": 1}}, {}, "its novel_config is {'x': 1}, which is not supported"),
        ({"use_qalora": True}, {}, "its use_qalora is True, which is not supported"),
        ({"layer_replication": [[0, 2]]}, {}, "its layer_replication is"),
        ({"target_modules": None}, {}, "it has no target_modules"),
        ({"target_modules": ["k_proj"]}, {}, "which its target_modules leave out; PEFT would not"),
        (
            {"layers_to_transform": [1]},
            {},
            "layers.0.mlp.down_proj, which its target_modules",
        ),
        ({"layers_pattern": "(a"}, {}, "layers_pattern must be names, such as 'layers'"),
        ({"target_modules": "(a"}, {}, "its target_modules is no pattern that is read"),
        ({"exclude_modules": "(?=a)"}, {}, "its exclude_modules is no pattern that is read"),
        ({"r": 5}, {}, "q_proj has an adapter of rank 3, and its config says 5"),
        ({"rank_pattern": {"down_proj": 0}}, {}, "its rank_pattern is 0; a rank is a whole number"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "random approximation off the base"),
        ({"init_lora_weights": "corda"}, {}, "PEFT itself does not load again"),
        ({"init_lora_weights": "loftq"}, {}, "'loftq', which rounds the base"),
        (
            {"init_lora_weights": "novel"},
            {},
            "'novel', which is not known here. Save it",
        ),
        ({"init_lora_weights": False}, Q_MISSING, "would make one that changes"),
        ({"lora_alpha": "x"}, {}, "its lora_alpha is 'x'"),
        ({"alpha_pattern": {"(?i)a": 1}}, {}, "its alpha_pattern is no pattern that is read"),
        ({"use_dora": True}, {}, "lora_magnitude_vector is missing"),
        ({}, {f"{KEY}B.weight": None}, "q_proj.lora_B.weight is missing"),
        ({}, {f"{KEY}A.weight": (3, 14)}, r"expected shape \[3, 13\], got \[3, 14\]"),
        ({}, {f"{KEY}A.weight": (0, 13)}, r"lora_A.weight: expected shape"),
        ({}, {f"{ROOT}.9.self_attn.q_proj.lora_A.weight": (3, 13)}, "no place for: layers.9"),
        (
            {},
            {"base_model.model.lm_head.lora_A.weight": (3, 13)},
            "lm_head, which its target_modules leave out",
        ),
        ({}, {"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": (3, 13)}, "twice"),
    ],
)
def test_damage_and_what_is_not_supported_end_in_a_sentence(tmp_path, changes, tensors, message):
    peft.save(adapted(), tmp_path / "a")
    _, before = read(tmp_path / "a")
    after = before | {
        name: None if shape is None else np.zeros(shape, np.float32)
        for name, shape in tensors.items()
    }
    rewrite(tmp_path / "a", {k: v for k, v in after.items() if v is not None}, **changes)
    with pytest.raises(CheckpointError, match=f"a cannot be loaded: .*{message}"):
        peft.load(tiny.model(tiny.GEMMA3), tmp_path / "a")


def test_files_that_are_cut_off_or_missing_are_named(tmp_path):
    model = tiny.model(tiny.GEMMA3)
    with pytest.raises(CheckpointError, match="adapter_config.json cannot be read"):
        peft.load(model, tmp_path)
    peft.save(adapted(), tmp_path / "a")
    whole = (tmp_path / "a" / peft.WEIGHTS).read_bytes()
    (tmp_path / "a" / peft.WEIGHTS).write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is cut off or damaged"):
        peft.load(model, tmp_path / "a")
    (tmp_path / "a" / peft.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="a cannot be"):
        peft.load(model, tmp_path / "a")
    peft.save(adapted(), tmp_path / "a")
    with pytest.raises(ValueError, match="`Int8Einsum` does not tell|load adapters before"):
        peft.load(quantize.int8(model), tmp_path / "a")


def test_bfloat16_and_float16_are_read(tmp_path):
    model = adapted()
    peft.save(model, tmp_path / "a")
    _, tensors = read(tmp_path / "a")
    rewrite(tmp_path / "a", {k: np.asarray(v, jnp.bfloat16) for k, v in tensors.items()})
    back = peft.load(tiny.model(tiny.GEMMA3), tmp_path / "a")
    for ours, read_again in zip(*map(lora.adapters, (model, back)), strict=True):
        assert ours == read_again
    up = lora.adapters(back)["layers.0.ffw.down"].up
    np.testing.assert_array_equal(up, model.layers[0].ffw.down.up.astype(jnp.bfloat16))
