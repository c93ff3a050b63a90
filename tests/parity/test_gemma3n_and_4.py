"""Tiny random Gemma 3n and 4 of `transformers`: saved there, loaded here, and the other way round.

Configs and weights go through files, so this also holds the names of their tensors. The same logits
at every position, of padded rows too, whole and through our cache.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma.checkpoint import CheckpointError, load_model
from equigemma.checkpoint.core._layout import split_layout
from equigemma.checkpoint.hf._config import read_config
from equigemma.checkpoint.hf._config_write import write_config
from equigemma.config import AltUpConfig, DensePlusMoEConfig, KeyIsValueConfig, SharedKVConfig


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


VOCAB, LENGTH, WINDOW = 61, 17, 5
# Both sum in float32 in orders of their own; logits reach 30, layers are up to 7.
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-4)
LOCAL, GLOBAL = "sliding_attention", "full_attention"
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=22,
    intermediate_size=29,
    num_attention_heads=2,
    head_dim=10,
    sliding_window=WINDOW,
)


def gemma3n():
    types = [LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL]
    return transformers.Gemma3nTextConfig(
        **SIZES | dict(intermediate_size=[29, 29, 29, 31, 29]),
        vocab_size_per_layer_input=VOCAB - 4,
        hidden_size_per_layer_input=6,
        num_key_value_heads=1,
        num_hidden_layers=5,
        layer_types=types,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.95, 0.5, 0.0, 0.3, 0.0],
        laurel_rank=3,
        final_logit_softcapping=11.0,
    )


def gemma4(kind: str = "Gemma4", *, layers: int, types: list[str], **options):
    return getattr(transformers, f"{kind}TextConfig")(
        **SIZES,
        num_hidden_layers=layers,
        layer_types=types,
        global_head_dim=14,
        final_logit_softcapping=7.0,
        **options,
    )


PERIOD = [LOCAL, LOCAL, GLOBAL]
CASES = {
    "gemma3n": gemma3n,
    "gemma4, small": lambda: gemma4(
        layers=7,
        types=[LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL, GLOBAL],
        num_key_value_heads=1,
        num_kv_shared_layers=3,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=VOCAB,
        use_double_wide_mlp=True,
    ),
    "gemma4, large": lambda: gemma4(
        layers=6,
        types=PERIOD * 2,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        use_bidirectional_attention="vision",
        rms_norm_eps=0.01,
    ),
    "gemma4, experts": lambda: gemma4(
        layers=3,
        types=PERIOD,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=7,
        top_k_experts=3,
        moe_intermediate_size=5,
    ),
    "gemma4 unified": lambda: gemma4(
        "Gemma4Unified",
        layers=3,
        types=PERIOD,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
    ),
}


def build(config):
    """Their model with random numbers in every tensor; norms and scales around one."""
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        around = float("norm" in name or name.endswith(("scale", "scalar")))
        # So that no token loses more digits than others: then both keep five of them.
        size = 0.1 if around else 0.25
        tensor.copy_(torch.as_tensor(around + size * rng.normal(size=tuple(tensor.shape))))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("folders")


@cache
def pair(name: str, folder) -> tuple[Any, eg.Transformer]:
    """Their model, and ours from the folder that they saved."""
    theirs = build(CASES[name]())
    theirs.save_pretrained(folder / name)
    return theirs, load_model(folder / name, dtype=np.float32)


@pytest.fixture(scope="module", params=CASES)
def models(request, folders):
    return pair(request.param, folders)


def their_logits(model, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Positions of −1 are padding."""
    with torch.no_grad():
        output = model(
            input_ids=torch.as_tensor(tokens),
            attention_mask=torch.as_tensor(positions >= 0).long(),
            position_ids=torch.as_tensor(positions).clamp(min=0),
            use_cache=False,
        )
    return output.logits.float().numpy()


def text(*shape: int) -> np.ndarray:
    # Of this seed no token loses more digits than others. Of some, float32 is up to 1.2e-4 from
    # float64, in torch as here.
    return np.random.default_rng(3).integers(3, VOCAB, shape)


def in_order(rows: int) -> np.ndarray:
    """Positions of texts without padding."""
    return np.arange(LENGTH) + np.zeros((rows, 1), int)


def test_every_position(models):
    theirs, ours = models
    tokens = text(2, LENGTH)
    expected = their_logits(theirs, tokens, in_order(2))
    assert np.abs(expected).max() > 1
    output = tiny.run(ours, tiny.host(tokens, np.int32))
    np.testing.assert_allclose(output.logits, expected, **CLOSE)


@pytest.mark.parametrize("before", [True, False], ids=["padding before", "padding after"])
def test_padded_rows(models, before):
    theirs, ours = models
    tokens = text(3, LENGTH)
    positions = np.full(tokens.shape, -1)
    for row, length in enumerate((LENGTH, 11, 2)):
        place = slice(LENGTH - length, LENGTH) if before else slice(0, length)
        positions[row, place] = np.arange(length)
    real = positions >= 0
    tokens = np.where(real, tokens, 0)
    output = tiny.run(ours, tiny.host(tokens, np.int32), positions=tiny.host(positions, np.int32))
    expected = their_logits(theirs, tokens, positions)
    np.testing.assert_allclose(np.asarray(output.logits)[real], expected[real], **CLOSE)


def test_through_our_cache(models):
    theirs, ours = models
    tokens = text(2, LENGTH)
    expected = their_logits(theirs, tokens, in_order(2))
    cache = tiny.empty_cache(ours.config, (2,), capacity=LENGTH)
    output = tiny.run_in_chunks(ours, tokens, (7, 1, 7, 1, 1), cache=cache)
    np.testing.assert_allclose(output.logits, expected, **CLOSE)


def test_what_we_save_they_load(models, tmp_path):
    theirs, ours = models
    eg.save(ours, tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], tensor, err_msg=name)
    tokens = text(2, LENGTH)
    np.testing.assert_allclose(
        their_logits(again.eval(), tokens, in_order(2)),
        their_logits(theirs, tokens, in_order(2)),
        **CLOSE,
    )
    # And here: the same config, the same numbers.
    assert load_model(tmp_path / "ours", dtype=np.float32).config == ours.config


def test_images_of_gemma_4_are_seen_whole_in_local_layers_only(folders):
    # Their masks, made from the types of the tokens, and vectors in place of an encoder's.
    from transformers.models.gemma4 import modeling_gemma4

    theirs, ours = pair("gemma4, large", folders)
    # Ahead their windows end nowhere, DeepMind's and ours do: no published image reaches so far.
    size, width = WINDOW, ours.config.width
    tokens = text(2, 19)
    tokens[0, 2:7], tokens[0, 10:15], tokens[1, 4:9] = (
        -2 - np.arange(start, start + size) for start in (0, 5, 0)
    )
    is_soft = torch.as_tensor(tokens < 0)
    soft = np.random.default_rng(5).normal(size=(2, 2, size, width)).astype(np.float32)
    with torch.no_grad():
        x = theirs.get_input_embeddings()(torch.as_tensor(tokens).clamp(min=0))
        x[is_soft] = torch.as_tensor(np.concatenate([soft[0].reshape(-1, width), soft[1, 0]]))
        blocks = modeling_gemma4.get_block_sequence_ids_for_mask(is_soft.long(), x.device)
        masks = modeling_gemma4.create_masks_for_vision_model(
            theirs.config, x, None, None, None, blocks
        )
        output = theirs.model(inputs_embeds=x, attention_mask=masks, use_cache=False)
        expected = output.last_hidden_state.numpy()
    hidden, _ = tiny.call(
        ours, "trunk", tiny.host(tokens, np.int32), soft_tokens=tiny.host(soft, float)
    )
    np.testing.assert_allclose(hidden, expected, **CLOSE)
    visible = [layer.attention.mask_kind for layer in ours.config.layers]
    assert visible == ["causal_bidirectional_images", "causal_bidirectional_images", "causal"] * 2


def test_what_the_configs_say(folders):
    configs = {name: pair(name, folders)[1].config for name in CASES}
    assert [configs["gemma3n"].owner(index) for index in range(5)] == [0, 1, 2, 1, 2]
    assert [configs["gemma4, small"].owner(index) for index in range(7)] == [0, 1, 2, 3, 2, 3, 2]
    assert isinstance(configs["gemma3n"].stream, AltUpConfig)
    assert configs["gemma3n"].layers[1].ffw.cutoff == pytest.approx(0.0, abs=1e-12)
    assert configs["gemma4, small"].layers[-1].ffw.hidden_dim == 2 * 29
    assert configs["gemma4, small"].layers[-1].attention.kv == SharedKVConfig(layer=2)
    for name in ("gemma4, large", "gemma4, experts", "gemma4 unified"):
        assert configs[name].layers[2].attention.kv == KeyIsValueConfig(heads=1)
        assert configs[name].layers[2].attention.head_dim == 14
    assert isinstance(configs["gemma4, experts"].layers[0].ffw, DensePlusMoEConfig)


# --- published models ----------------------------------------------------------------------------


def published(kind: str, **options):
    """Their config with the options of a published checkpoint, without its weights."""
    return getattr(transformers, f"{kind}TextConfig")(**options).to_dict()


PUBLISHED = {
    "gemma3n-e4b": lambda: published("Gemma3n", vocab_size=262_144),
    "gemma4-e2b": lambda: published(
        "Gemma4",
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=35,
        num_key_value_heads=1,
        layer_types=([LOCAL] * 4 + [GLOBAL]) * 7,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        final_logit_softcapping=30.0,
    ),
    "gemma4-26b-a4b": lambda: published(
        "Gemma4",
        hidden_size=2816,
        intermediate_size=2112,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        sliding_window=1024,
        hidden_size_per_layer_input=0,
        use_bidirectional_attention="vision",
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        final_logit_softcapping=30.0,
    ),
    "gemma4-12b": lambda: published(
        "Gemma4Unified",
        hidden_size=3840,
        intermediate_size=15_360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        final_logit_softcapping=30.0,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants(name):
    # Their tree keeps no weights that nothing reads; ours, after DeepMind's, does. And they cap the
    # logits of Gemma 3n, as DeepMind's package does not.
    config = replace(split_layout(eg.variants.get(name)), final_softcap=30.0)
    assert read_config(PUBLISHED[name]()) == config
    assert read_config(write_config(config)) == config


def test_no_cap_on_logits_is_not_made_into_one():
    with pytest.raises(CheckpointError, match="caps the logits of every Gemma 3n"):
        write_config(eg.variants.get("gemma3n-e4b"))
