"""The rest of the family: VaultGemma, and which published members load as which model.

No real `config.json` can be had here: those of the table are made by the config classes of
`transformers`, with the sizes of the models that the members are fine-tuned from.
"""

import json
from dataclasses import replace
from typing import Any

import formats
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma.checkpoint import CheckpointError, load_model
from equigemma.checkpoint.core._layout import split_layout
from equigemma.checkpoint.hf._config import read_config
from equigemma.checkpoint.hf._config_write import write_config
from equigemma.checkpoint.hf._unsupported import UNSUPPORTED
from equigemma.config import FeedForwardConfig, SigLIPConfig


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


WINDOW, VOCAB = 5, formats.VOCAB
# Float32, sums in other orders, four layers, logits of size 3.
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-4)


# VaultGemma.


@pytest.fixture(scope="module")
def vault(tmp_path_factory):
    """Their tiny model, ours, and the folder that they wrote."""
    config = transformers.VaultGemmaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=29,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        query_pre_attn_scalar=7,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    )
    config._attn_implementation = "eager"
    theirs = transformers.VaultGemmaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
    folder = tmp_path_factory.mktemp("vault")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder, dtype="float32"), folder


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens.copy()), use_cache=False).logits.numpy()


def test_vaultgemma(vault):
    theirs, ours, _ = vault
    for layer in ours.layers:
        assert layer.post_attention_norm is None and layer.post_ffw_norm is None
    assert [layer.attention.window for layer in ours.config.layers] == [WINDOW, None] * 2
    tokens = np.asarray(tiny.tokens(2, 13))
    expected = their_logits(theirs, tokens)
    assert np.abs(expected).max() > 1
    output = tiny.run(ours, tiny.host(tokens, np.int32))
    np.testing.assert_allclose(output.logits, expected, **CLOSE)
    for sizes in ([1] * 13, [7, 1, 5]):
        cache = tiny.empty_cache(ours.config, (2,), capacity=13)
        chunked = tiny.run_in_chunks(ours, tokens, sizes, cache=cache)
        np.testing.assert_allclose(chunked.logits, expected, **CLOSE)


def test_vaultgemma_of_ours(vault, tmp_path):
    theirs, ours, folder = vault
    eg.save(ours, tmp_path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again).__name__ == "VaultGemmaForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name
    tokens = np.asarray(tiny.tokens(2, 13))
    np.testing.assert_array_equal(their_logits(again.eval(), tokens), their_logits(theirs, tokens))
    written = json.loads((folder / "config.json").read_text())
    assert read_config(write_config(ours.config)) == read_config(written)


def test_vaultgemma_is_nothing_that_llama_cpp_knows(vault, tmp_path):
    _, ours, _ = vault
    with pytest.raises(CheckpointError, match="would be another one"):
        eg.save(ours, tmp_path / "x.gguf", tokenizer=formats.tokenizer())
    assert not (tmp_path / "x.gguf").exists()


def test_vaultgemma_without_what_tells_it_apart():
    config = transformers.VaultGemmaConfig(
        num_hidden_layers=2,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention"] * 2,
    )
    with pytest.raises(CheckpointError, match="makes it a model of the kind 'gemma'"):
        read_config(config.to_dict())


# Members that are other weights of a known model.


def sizes_of(name: str) -> dict[str, Any]:
    """What a config class calls the sizes of a variant."""
    config = eg.variants.get(name)
    first = config.layers[0]
    assert isinstance(first.ffw, FeedForwardConfig)
    attention = first.attention
    return dict(
        hidden_size=config.width,
        intermediate_size=first.ffw.hidden_dim,
        num_hidden_layers=len(config.layers),
        num_attention_heads=attention.heads,
        num_key_value_heads=config.kv_heads(0),
        head_dim=attention.head_dim,
    )


def gemma2(name: str) -> dict[str, Any]:
    return sizes_of(name) | dict(
        query_pre_attn_scalar=round(eg.variants.get(name).layers[0].attention.query_scale ** -2)
    )


def gemma3(name: str) -> dict[str, Any]:
    config = eg.variants.get(name)
    local, global_ = config.layers[0].attention, config.layers[5].attention
    scaling = {"rope_type": "default", "rope_theta": global_.rope.theta}
    if global_.rope.scale != 1:
        scaling |= {"rope_type": "linear", "factor": global_.rope.scale}
    return gemma2(name) | dict(
        sliding_window=local.window,
        rope_parameters={
            "full_attention": scaling,
            "sliding_attention": {"rope_type": "default", "rope_theta": local.rope.theta},
        },
    )


def with_images(name: str) -> dict[str, Any]:
    vision = eg.variants.get(name).vision
    assert isinstance(vision, SigLIPConfig)
    return dict(
        text_config=gemma3(name),
        vision_config=dict(
            hidden_size=vision.width,
            intermediate_size=vision.hidden,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=vision.pixels,
            patch_size=vision.patch,
        ),
        mm_tokens_per_image=vision.num_soft_tokens,
    )


# Name, the config class, its options, and the variant of the same sizes.
MEMBERS = [
    ("codegemma-2b", "GemmaConfig", sizes_of, "gemma1-2b"),
    ("codegemma-7b", "GemmaConfig", sizes_of, "gemma1-7b"),
    ("shieldgemma-2b", "Gemma2Config", gemma2, "gemma2-2b"),
    ("gemma-2-2b-jpn", "Gemma2Config", gemma2, "gemma2-2b"),
    ("txgemma-2b", "Gemma2Config", gemma2, "gemma2-2b"),
    ("txgemma-9b", "Gemma2Config", gemma2, "gemma2-9b"),
    ("txgemma-27b", "Gemma2Config", gemma2, "gemma2-27b"),
    ("datagemma-27b", "Gemma2Config", gemma2, "gemma2-27b"),
    ("functiongemma-270m", "Gemma3TextConfig", gemma3, "gemma3-270m"),
    ("medgemma-27b-text", "Gemma3TextConfig", gemma3, "gemma3-27b-text"),
    ("medgemma-4b", "Gemma3Config", with_images, "gemma3-4b"),
    ("medgemma-27b", "Gemma3Config", with_images, "gemma3-27b"),
    ("translategemma-4b", "Gemma3Config", with_images, "gemma3-4b"),
    ("translategemma-12b", "Gemma3Config", with_images, "gemma3-12b"),
    ("translategemma-27b", "Gemma3Config", with_images, "gemma3-27b"),
]


@pytest.mark.parametrize(
    "kind, options, variant", [row[1:] for row in MEMBERS], ids=[row[0] for row in MEMBERS]
)
def test_members_are_known_models(kind, options, variant, tmp_path):
    theirs = getattr(transformers, kind)(**options(variant.removesuffix("-text")))
    theirs.save_pretrained(tmp_path)
    config = read_config(json.loads((tmp_path / "config.json").read_text()))
    expected = split_layout(eg.variants.get(variant.removesuffix("-text")))
    if variant.endswith("-text"):
        expected = expected.text_only()
    # Published files and DeepMind's differ in how many rows of the table are padding.
    assert config == replace(expected, vocab=config.vocab)


# Members that are not supported.


KINDS = {
    "t5gemma": "T5GemmaConfig",
    "t5gemma2": "T5Gemma2Config",
    "recurrent_gemma": "RecurrentGemmaConfig",
    "diffusion_gemma": "DiffusionGemmaConfig",
    "gemma4_assistant": "Gemma4AssistantConfig",
    "gemma4_unified_assistant": "Gemma4UnifiedAssistantConfig",
    "embedding_gemma2": "EmbeddingGemma2Config",
    "paligemma": "PaliGemmaConfig",
    "shieldgemma2": "ShieldGemma2Config",
}


@pytest.mark.parametrize("kind", KINDS)
def test_members_that_are_refused_by_name(kind):
    """With the name that their own config has, and the nearest thing that works."""
    theirs = getattr(transformers, KINDS[kind])
    assert theirs.model_type == kind
    with pytest.raises(CheckpointError, match=f"model_type is '{kind}'; {UNSUPPORTED[kind]}the"):
        read_config({"model_type": kind})


def test_every_refusal_is_tested():
    assert UNSUPPORTED.keys() == KINDS.keys()
