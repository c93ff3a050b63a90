"""The parts of a Linen module that trainers, evaluators and notebooks reach for."""

import dataclasses
import json
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
import upstream

from equigemma import linen


SHIM = linen.Transformer(config=tiny.GEMMA3, dtype=jnp.float32)
NAMES = sorted(name for name in dir(linen) if name.startswith("Gemma"))


@cache
def trees() -> dict[str, Any]:
    return json.loads((upstream.GOLDEN / "upstream_trees.json").read_text())


class TestKeys:
    """Where a trainer finds the inputs of a model."""

    def test_as_fields(self):
        model = linen.Gemma3_4B(tokens="batch.input", images="batch.image")
        assert model.__kontext_keys__() == {
            "tokens": "batch.input",
            "images": "batch.image",
            "positions": None,
            "attention_mask": None,
        }
        assert (model.tokens, model.images) == ("batch.input", "batch.image")
        assert model != linen.Gemma3_4B() and hash(model) != hash(linen.Gemma3_4B())

    def test_tokens_must_be_given_and_images_need_not(self):
        assert linen.Gemma3_270M().tokens == "__KEY_REQUIRED__"
        assert linen.Gemma3_270M().images is None


class TestCopies:
    def test_a_clone(self):
        bigger = SHIM.clone(dtype="bfloat16", tokens="batch.input")
        assert type(bigger) is type(SHIM)
        assert (bigger.dtype, bigger.tokens) == (jnp.bfloat16, "batch.input")
        assert bigger.clone(dtype=jnp.float32, tokens=SHIM.tokens) == SHIM

    def test_a_copy_has_the_name_it_is_given_or_none(self):
        named = SHIM.copy(name="anchor")
        assert named.name == "anchor" and named.copy() == SHIM

    def test_another_config_keeps_its_tower(self):
        text = linen.Transformer(config=tiny.GEMMA3)
        assert text.clone(config=tiny.GEMMA3_SEEING).config.model.vision == tiny.VISION
        blind = linen.Transformer(config=tiny.GEMMA3, text_only=True)
        assert blind.clone(config=tiny.GEMMA3_SEEING).config.model.vision is None

    def test_unknown_fields_are_refused(self):
        with pytest.raises(TypeError, match="vocab"):
            SHIM.clone(vocab=3)


class TestTable:
    def test_counts_every_parameter_once(self):
        table = linen.Gemma3_270M().tabulate(jax.random.key(0), tiny.tokens(2, 5))
        lines = table.splitlines()
        number = trees()["Gemma3_270M"]["num_params"]
        assert lines[-1].split() == ["total", "0.536", "GB", f"{number:,}"]
        sizes = [int(line.split()[-1].replace(",", "")) for line in lines[2:-2]]
        assert sum(sizes) == number
        assert any(
            line.startswith("layer_3/attn/q_einsum") and "w: bfloat16[4, 640, 256]" in line
            for line in lines
        )

    def test_of_some_depth(self):
        table = SHIM.tabulate(
            jax.random.key(0), tiny.tokens(2, 5), depth=1, console_kwargs={"width": 80}
        )
        paths = [line.split()[0] for line in table.splitlines()[2:-2]]
        assert paths == ["embedder", "final_norm", "layer_0", "layer_1"]

    def test_arguments_are_checked(self):
        with pytest.raises(TypeError, match="`tokens` must be int"):
            SHIM.tabulate(jax.random.key(0), jnp.ones(5))


class TestWrappers:
    """What replaces Linen modules cannot work here, and says what does."""

    def test_the_scope_that_wrappers_look_for(self):
        with pytest.raises(AttributeError, match=r"equigemma\.lora .*equigemma\.quantize"):
            _ = SHIM.scope
        assert not hasattr(SHIM, "scope")


# Fields of DeepMind's configs that have no one value here: rules, and patterns of layers.
UNSAID = {
    "query_pre_attn_norm",
    "activation_sparsity_pattern",
    "kv_cache_sharing_config",
    "guard_against_excess_precision",
    "use_bidirectional_attention",
    "vision_encoder",
}


@pytest.mark.parametrize("name", NAMES)
def test_config_has_their_dimensions(name):
    config, expected = getattr(linen, name)().config, trees()[name]["config"]
    for field, value in expected.items():
        if field in UNSAID:
            continue
        ours = getattr(config, field)
        if field == "attention_types":
            ours = [kind.name for kind in ours]
        # Where there are no experts, their default for how many are chosen is 8.
        if field == "top_k_experts" and not expected["enable_moe"]:
            value = 0
        assert ours == value, field
    assert config.num_layers == len(expected["attention_types"])


def test_the_factor_of_queries():
    assert linen.Gemma3_270M().config.query_pre_attn_scalar() == 256**-0.5
    assert linen.Gemma3_27B().config.query_pre_attn_scalar() == (5376 // 32) ** -0.5
    assert linen.Gemma3n_E2B().config.query_pre_attn_scalar() == 1.0


def test_the_dimensions_of_the_tower():
    vision = linen.Gemma3_4B().config.vision_encoder
    expected = trees()["Gemma3_4B_mm"]["config"]["vision_encoder"]
    found = dataclasses.asdict(vision)
    for field, value in found.pop("siglip_encoder").items():
        given = expected["siglip_encoder"][field]
        assert value == (tuple(given) if isinstance(given, list) else given), field
    assert found == {field: expected[field] for field in found}
    assert linen.Gemma3_4B(text_only=True).config.vision_encoder is None


def test_their_configs_are_taken_as_they_are():
    config = trees()["Gemma3_4B_mm"]["config"]
    model = linen.Transformer(config=config)
    assert model.config == linen.Gemma3_4B().config
    assert linen.Transformer(config=config, text_only=True).config.vision_encoder is None

    class Named(linen.Transformer):
        """A class of the user's, with a config of theirs."""

    Named.config = trees()["Gemma3_270M"]["config"]
    assert Named().config == linen.Gemma3_270M().config
    with pytest.raises(ValueError, match="has also alibi"):
        linen.Transformer(config=config | {"alibi": True})


def test_ids_of_the_vocabulary():
    tokens = SHIM.config.input_config.special_tokens
    assert (tokens.BEGIN_OF_TOOL_RESPONSE, tokens.END_OF_TURN, tokens.EOS) == (50, 106, 1)


class Patches:
    """Images as DeepMind's sampler for Gemma 4 hands them over."""

    patches = jnp.zeros((1, 4, 12))
    positions_xy = jnp.zeros((1, 4, 2), jnp.int32)
    soft_token_counts = (1,)


def test_images_and_audio_for_gemma_4():
    shim = linen.Transformer(config=tiny.GEMMA4_SMALL)
    variables = linen.to_variables(tiny.model(tiny.GEMMA4_SMALL))
    with pytest.raises(ValueError, match="`images` are patches for the vision encoder of Gemma 4"):
        shim.apply(variables, tiny.tokens(2, 5), images=Patches())
    with pytest.raises(ValueError, match="`audio` is not supported"):
        shim.apply(variables, tiny.tokens(2, 5), audio=jnp.zeros((1, 1, 8)))
    options = {"audio": None, "audio_lengths": None, "audio_soft_token_counts": ()}
    assert shim.apply(variables, tiny.tokens(2, 5), **options).logits.shape == (2, 5, tiny.VOCAB)
