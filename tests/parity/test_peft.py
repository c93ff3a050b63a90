"""Adapters of `peft` here, and ours there: the same logits."""

import json
import re
import tempfile
import warnings
from functools import cache
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
import tiny

from equigemma import lora, peft
from equigemma.checkpoint import CheckpointError, load_model


torch = pytest.importorskip("torch", reason="peft runs on torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
theirs_of_adapters = pytest.importorskip("peft", reason="peft is not installed")

import safetensors.torch  # noqa: E402
from parity.test_transformers import (  # noqa: E402
    CASES,
    LENGTH,
    build,
    config_of,
    give,
    in_order,
    text,
    their_logits,
)


# peft asks transformers for something by a name that is going out of use.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

# Sums in float32 in another order; logits reach 20, and adapters make them larger.
CLOSE = dict(rtol=1e-4, atol=1e-4)
NAMES = ["gemma1, a key head for each", "gemma2", "gemma3"]
EVERYTHING = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
KINDS = {
    "lora": {"target_modules": EVERYTHING},
    "dora": {"target_modules": EVERYTHING, "use_dora": True},
    "rslora": {"target_modules": EVERYTHING, "use_rslora": True},
    "usual places, other ranks": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.v_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 11},
    },
}


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def pair(name: str):
    """Theirs is changed by adapters, so each test has its own."""
    theirs = build(CASES[name]())
    ours = tiny.model(config_of(theirs.config))
    give(ours, theirs)
    return theirs, ours


def logits(model) -> np.ndarray:
    return np.asarray(tiny.run(model, tiny.host(text(2, LENGTH), np.int32)).logits)


def of_theirs(model) -> np.ndarray:
    return their_logits(model, text(2, LENGTH), in_order(2, LENGTH))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_adapters_that_peft_wrote(name, kind, tmp_path):
    theirs, ours = pair(name)
    config = theirs_of_adapters.LoraConfig(
        r=3, lora_alpha=5, task_type="CAUSAL_LM", init_lora_weights=False, **KINDS[kind]
    )
    torch.manual_seed(0)
    adapted = theirs_of_adapters.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "magnitude" in parameter_name:
                parameter.mul_(1.3)
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    expected = of_theirs(adapted)
    assert np.abs(expected - logits(ours)).max() > 0.1
    np.testing.assert_allclose(logits(peft.load(ours, tmp_path / "a")), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_what_is_written_here(name, kind, tmp_path):
    theirs, ours = pair(name)
    model = lora.add(ours, rank=3, alpha=5.0, key=jax.random.key(0), kind=kind)
    rng = np.random.default_rng(2)
    adapters, rest = lora.split(model)
    adapters = jax.tree.map(
        lambda leaf: tiny.host(rng.normal(size=leaf.shape) * 0.3 + 0.1, leaf.dtype), adapters
    )
    model = eqx.combine(adapters, rest)
    peft.save(model, tmp_path / "a")
    adapted = theirs_of_adapters.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    expected = logits(model)
    assert np.abs(expected - logits(ours)).max() > 0.1
    np.testing.assert_allclose(of_theirs(adapted), expected, **CLOSE)


# Everything that a file of peft can say: what peft computes with the file that it saved, on the
# same base, is what is computed here, or it is refused by name.


SIZES = dict(
    vocab_size=61,
    hidden_size=28,
    intermediate_size=17,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
)
LOCAL = dict(
    sliding_window=5, layer_types=["sliding_attention", "full_attention", "full_attention"]
)


def bases() -> dict:
    """Configs of theirs."""
    images = dict(
        hidden_size=15,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=5,
        image_size=12,
        patch_size=2,
    )
    return {
        "tied": lambda: transformers.Gemma3TextConfig(**SIZES, **LOCAL),
        "untied": lambda: transformers.Gemma3TextConfig(
            **SIZES, **LOCAL, tie_word_embeddings=False
        ),
        # Two line ends, and what stands around an image, are ids below 113.
        "images": lambda: transformers.Gemma3Config(
            text_config=SIZES | LOCAL | dict(vocab_size=113),
            vision_config=images,
            mm_tokens_per_image=4,
            boi_token_index=109,
            eoi_token_index=110,
            image_token_index=112,
        ),
        "experts": lambda: transformers.Gemma4TextConfig(
            **SIZES,
            **LOCAL,
            global_head_dim=20,
            hidden_size_per_layer_input=0,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=5,
        ),
        "streams": lambda: transformers.Gemma3nTextConfig(
            **SIZES,
            **LOCAL,
            num_kv_shared_layers=0,
            activation_sparsity_pattern=[0.5, 0.0, 0.0],
            vocab_size_per_layer_input=61,
            hidden_size_per_layer_input=6,
            laurel_rank=3,
        ),
    }


@cache
def folder_of(name: str) -> Path:
    """A model of theirs in a folder, with numbers in every weight that matter."""
    config = bases()[name]()
    config._attn_implementation = config._experts_implementation = "eager"
    auto = transformers.AutoModelForImageTextToText
    auto = auto if name == "images" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            around = 1.0 if "norm" in key and name == "experts" else 0.0
            scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1
            weight.normal_(around, scale, generator=generator)
    folder = Path(tempfile.mkdtemp())
    model.save_pretrained(folder)
    return folder


def base_of(name: str):
    """Their model, a new one each time: adapters change it."""
    auto = transformers.AutoModelForImageTextToText
    auto = auto if name == "images" else transformers.AutoModelForCausalLM
    return auto.from_pretrained(
        folder_of(name), attn_implementation="eager", experts_implementation="eager"
    ).eval()


def ours_of(name: str):
    return load_model(folder_of(name), dtype="float32")


def rows(name: str) -> np.ndarray:
    return np.random.default_rng(3).integers(3, 61, (2, 11))


def of_theirs_now(model, name: str) -> np.ndarray:
    """Logits of texts; with a tower also what it makes of an image."""
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(rows(name)), use_cache=False).logits.numpy()
        if name != "images":
            return logits
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        pixels = torch.as_tensor(picture().astype(np.float32).transpose(0, 3, 1, 2))
        soft = inner.model.get_image_features(pixels / 127.5 - 1).pooler_output
        return np.concatenate([logits.ravel(), np.asarray(soft).ravel()])


def picture() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (1, 12, 12, 3)).astype(np.uint8)


def of_ours_now(model, name: str) -> np.ndarray:
    logits = np.asarray(tiny.run(model, tiny.host(rows(name), np.int32)).logits)
    if name != "images":
        return logits
    soft = tiny.call(model, "encode_images", tiny.host(picture(), np.uint8))
    return np.concatenate([logits.ravel(), np.asarray(soft).ravel()])


def learned(model, seed: int = 1) -> None:
    """Numbers in everything that an adapter file holds, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ("lora_", "modules_to_save", "trainable_tokens")
    with torch.no_grad():
        for key, weight in model.named_parameters():
            is_bias = key.endswith(".bias") and weight.requires_grad
            if (any(kind in key for kind in kinds) or is_bias) and "original" not in key:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)


def made(name: str, folder: Path, **options) -> np.ndarray:
    """Has peft write an adapter; gives what peft computes when it has loaded it again."""
    options = dict(r=4, lora_alpha=6, task_type="CAUSAL_LM") | options
    with warnings.catch_warnings():
        # It says what is unwise; here it is wanted.
        warnings.simplefilter("ignore")
        config = theirs_of_adapters.LoraConfig(**options)
        torch.manual_seed(0)
        model = theirs_of_adapters.get_peft_model(base_of(name), config).eval()
        learned(model)
        model.save_pretrained(folder)
        torch.manual_seed(1)
        again = theirs_of_adapters.PeftModel.from_pretrained(base_of(name), folder).eval()
    expected = of_theirs_now(again, name)
    np.testing.assert_allclose(of_theirs_now(model, name), expected, **CLOSE)
    return expected


def loaded(name: str, folder: Path):
    """Their model with an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs_of_adapters.PeftModel.from_pretrained(base_of(name), folder).eval()


QV = ["q_proj", "v_proj"]
BOTH = ["embed_tokens", "lm_head"]
SAID = {
    "regular expression": dict(target_modules=r".*\.[02]\..*(q|v|down)_proj"),
    "all linear": dict(target_modules="all-linear"),
    "some layers": dict(target_modules=QV, layers_to_transform=[0, 2], layers_pattern="layers"),
    "one layer": dict(target_modules=QV, layers_to_transform=1),
    "all but": dict(target_modules=QV, exclude_modules=["layers.0.self_attn.v_proj"]),
    "all but a pattern": dict(target_modules=QV, exclude_modules=r".*\.1\..*v_proj"),
    "embedding": dict(target_modules=["embed_tokens"]),
    "head": dict(target_modules=["lm_head"]),
    "embedding and head": dict(target_modules=[*BOTH, "q_proj"]),
    "embedding, ties kept": dict(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "head, ties kept": dict(target_modules=["lm_head"], ensure_weight_tying=True),
    "both, ties kept": dict(target_modules=[*BOTH, "k_proj"], ensure_weight_tying=True),
    "head whole": dict(target_modules=QV, modules_to_save=["lm_head"]),
    "embedding whole": dict(target_modules=QV, modules_to_save=["embed_tokens"]),
    "both whole": dict(target_modules=QV, modules_to_save=BOTH),
    "embedding whole, ties kept": dict(
        target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "head whole, ties kept": dict(
        target_modules=QV, modules_to_save=["lm_head"], ensure_weight_tying=True
    ),
    "norms and keys whole": dict(
        target_modules=["q_proj"], modules_to_save=["input_layernorm", "k_proj", "norm"]
    ),
    "rows": dict(target_modules=QV, trainable_token_indices=[7, 3, 60]),
    "rows of both": dict(
        target_modules=QV, trainable_token_indices={"embed_tokens": [7, 3], "lm_head": [7, 3]}
    ),
    "rows of the head": dict(target_modules=QV, trainable_token_indices={"lm_head": [7, 3]}),
    "rank stabilised": dict(target_modules=QV, use_rslora=True),
    "biases": dict(target_modules=QV, bias="all"),
    "biases of adapters": dict(target_modules=QV, bias="lora_only"),
    **{
        f"begun as {start}": dict(target_modules=[*QV, "down_proj"], init_lora_weights=start)
        for start in ("gaussian", "pissa", "olora", "eva", "orthogonal", "mica", "lora_ga", False)
    },
    "begun as pissa, rank stabilised": dict(
        target_modules=QV, init_lora_weights="pissa", use_rslora=True
    ),
    "begun as pissa, of other ranks": dict(
        target_modules=[*QV, "k_proj", "up_proj"],
        init_lora_weights="pissa",
        rank_pattern={"k_proj": 2, "v_proj": 7},
        alpha_pattern={"layers.1.self_attn.v_proj": 11},
    ),
    "begun as olora, DoRA": dict(target_modules=QV, init_lora_weights="olora", use_dora=True),
    "begun as pissa, DoRA": dict(
        target_modules=[*QV, "gate_proj"], init_lora_weights="pissa", use_dora=True
    ),
    "embedding, begun as pissa": dict(
        target_modules=["embed_tokens", "q_proj"], init_lora_weights="pissa"
    ),
    "VeLoRA": dict(target_modules=["q_proj"], velora_config=dict(num_groups=4)),
    "negative strength": dict(target_modules=QV, lora_alpha=-3),
    "keys without strength": dict(
        target_modules=[*QV, "k_proj"], alpha_pattern={"k_proj": 0, "layers.1.self_attn.q_proj": 0}
    ),
    "olora, negative": dict(target_modules=QV, init_lora_weights="olora", lora_alpha=-3),
    "dropout": dict(target_modules=QV, lora_dropout=0.3),
}
CASES_OF_FILES = [
    *(("tied", case) for case in SAID),
    *(("untied", case) for case in SAID if re.search("embedding|head|both", case)),
    *(("images", case) for case in ("regular expression", "all linear", "biases", "head")),
    *(("images", case) for case in ("embedding and head", "head whole", "rows", "one layer")),
    *(
        ("images", case)
        for case in ("begun as pissa", "norms and keys whole", "biases of adapters")
    ),
    ("experts", "all linear"),
    ("experts", "begun as pissa"),
    ("streams", "embedding and head"),
    ("streams", "some layers"),
]


@pytest.mark.parametrize(("base", "case"), CASES_OF_FILES)
def test_everything_that_a_file_says(base, case, tmp_path):
    expected = made(base, tmp_path / "a", **SAID[case])
    plain = ours_of(base)
    assert np.abs(expected - of_ours_now(plain, base)).max() > 1e-2
    model = peft.load(plain, tmp_path / "a")
    np.testing.assert_allclose(of_ours_now(model, base), expected, **CLOSE)
    # Folded in, it computes the same; with the base that is left out it is as it was.
    np.testing.assert_allclose(of_ours_now(lora.merge(model), base), expected, **CLOSE)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_without_strength_change_nothing(dora, tmp_path):
    # A magnitude of DoRA counts all the same.
    names = EVERYTHING if dora else [*EVERYTHING, "embed_tokens"]
    expected = made("tied", tmp_path / "a", target_modules=names, lora_alpha=0, use_dora=dora)
    model = peft.load(ours_of("tied"), tmp_path / "a")
    np.testing.assert_allclose(of_ours_now(model, "tied"), expected, **CLOSE)
    np.testing.assert_allclose(of_ours_now(lora.merge(model), "tied"), expected, **CLOSE)
    peft.save(model, tmp_path / "b")
    again = loaded("tied", tmp_path / "b")
    np.testing.assert_allclose(of_theirs_now(again, "tied"), expected, **CLOSE)


NO_NUMBERS = {
    "rank 0": ({"r": 0}, "its r is 0; a rank is a whole number from 1 up"),
    "rank as text": ({"r": "4"}, "its r is '4'; a rank is a whole number"),
    "no rank": ({"r": None}, "its r is None; a rank is a whole number"),
    "half a rank": ({"r": 4.5}, "its r is 4.5; a rank is a whole number"),
    "strength as text": ({"lora_alpha": "6"}, "its lora_alpha is '6'; a number was expected"),
    "no strength": ({"lora_alpha": None}, "its lora_alpha is None; a number was expected"),
    "strength of a part as text": (
        {"alpha_pattern": {"q_proj": "6"}},
        "its alpha_pattern is '6'; a number was expected",
    ),
    "rank of a part as text": (
        {"rank_pattern": {"q_proj": "4"}},
        "its rank_pattern is '4'; a rank is a whole number",
    ),
}


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_what_peft_does_not_load_is_a_sentence_here(case, tmp_path):
    changes, says = NO_NUMBERS[case]
    made("tied", tmp_path / "a", target_modules=QV)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        loaded("tied", tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"a cannot be loaded: {says}"):
        peft.load(ours_of("tied"), tmp_path / "a")


def test_pissa_needs_a_strength(tmp_path):
    made("tied", tmp_path / "a", target_modules=QV, init_lora_weights="pissa")
    file = tmp_path / "a" / "adapter_config.json"
    for alpha in (0, -3):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": alpha}))
        assert np.isnan(of_theirs_now(loaded("tied", tmp_path / "a"), "tied")).all()
        with pytest.raises(CheckpointError, match=f"lora_alpha is {alpha}, and PiSSA divides"):
            peft.load(ours_of("tied"), tmp_path / "a")


@pytest.mark.parametrize("base", ["tied", "images"])
@pytest.mark.parametrize("case", ["embedding and head", "both, ties kept", "all linear", "head"])
def test_what_was_read_is_written_for_peft(base, case, tmp_path):
    expected = made(base, tmp_path / "a", **SAID[case])
    model = peft.load(ours_of(base), tmp_path / "a")
    peft.save(model, tmp_path / "b")
    np.testing.assert_allclose(of_theirs_now(loaded(base, tmp_path / "b"), base), expected, **CLOSE)
    assert eqx.tree_equal(peft.load(ours_of(base), tmp_path / "b"), model)


@pytest.mark.parametrize("case", ["begun as pissa", "begun as olora, DoRA"])
def test_adapters_that_took_from_the_base_are_written_as_plain_ones(case, tmp_path):
    expected = made("tied", tmp_path / "a", **SAID[case])
    model = peft.load(ours_of("tied"), tmp_path / "a")
    assert eqx.tree_equal(lora.remove(model), ours_of("tied"))
    peft.save(model, tmp_path / "b")
    again = loaded("tied", tmp_path / "b")
    np.testing.assert_allclose(of_theirs_now(again, "tied"), expected, **CLOSE)


@pytest.mark.parametrize("case", ["head whole", "both whole", "norms and keys whole"])
def test_whole_weights_are_written_where_they_are_named(case, tmp_path):
    names = SAID[case]["modules_to_save"]
    expected = made("tied", tmp_path / "a", **SAID[case])
    model = peft.load(ours_of("tied"), tmp_path / "a")
    peft.save(model, tmp_path / "b", modules_to_save=names)
    again = loaded("tied", tmp_path / "b")
    np.testing.assert_allclose(of_theirs_now(again, "tied"), expected, **CLOSE)


EXPERTS_SAID = {
    "both": dict(
        target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    ),
    "one": dict(target_modules=["o_proj"], target_parameters=["experts.down_proj"]),
    "the other": dict(target_modules=[], target_parameters=["experts.gate_up_proj"]),
}


@pytest.mark.parametrize("case", EXPERTS_SAID)
def test_parameters_of_experts(case, tmp_path):
    expected = made("experts", tmp_path / "a", **EXPERTS_SAID[case])
    plain = ours_of("experts")
    assert np.abs(expected - of_ours_now(plain, "experts")).max() > 1e-2
    model = peft.load(plain, tmp_path / "a")
    np.testing.assert_allclose(of_ours_now(model, "experts"), expected, **CLOSE)
    np.testing.assert_allclose(of_ours_now(lora.merge(model), "experts"), expected, **CLOSE)


PATTERNS = {
    "^q_proj": 3,
    "q.proj": 5,
    "layers.1.self_attn.v_proj": 7,
    r"layers\.(0|2)\.self_attn\.v_proj": 2,
    ".*v_proj": 6,
    "^model.layers.0.self_attn.q_proj": 8,
    "v_proj|x": 9,
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
def test_patterns_are_expressions_for_whole_names(key, pattern, tmp_path):
    options = {key: {pattern: PATTERNS[pattern]}}
    expected = made("tied", tmp_path / "a", target_modules=QV, **options)
    model = peft.load(ours_of("tied"), tmp_path / "a")
    np.testing.assert_allclose(of_ours_now(model, "tied"), expected, **CLOSE)


def test_the_first_pattern_that_fits_counts(tmp_path):
    patterns = {"^q_proj": 50, ".*q_proj": 3, "layers.1.self_attn.q_proj": 40}
    expected = made("tied", tmp_path / "a", target_modules=QV, alpha_pattern=patterns)
    model = peft.load(ours_of("tied"), tmp_path / "a")
    np.testing.assert_allclose(of_ours_now(model, "tied"), expected, **CLOSE)
    assert lora.adapters(model)["layers.1.attention.projection.q"].scale == 3 / 4


def test_names_with_the_adapter_in_them(tmp_path):
    """As trainers leave them that save the state of a model themselves."""
    expected = made("tied", tmp_path / "a", **SAID["embedding and head"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    named = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        for kind in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            key = re.sub(rf"\.{kind}(?=\.weight$|$)", f".{kind}.default", key)
        named[key] = tensor
    assert any(key.endswith("lora_A.default.weight") for key in named)
    safetensors.torch.save_file(named, path)
    model = peft.load(ours_of("tied"), tmp_path / "a")
    np.testing.assert_allclose(of_ours_now(model, "tied"), expected, **CLOSE)
    other = {key.replace("default", "other"): tensor.clone() for key, tensor in named.items()}
    some = dict(list(other.items())[:2])
    safetensors.torch.save_file(named | some, path)
    with pytest.raises(CheckpointError, match="twice|several adapters, default and other"):
        peft.load(ours_of("tied"), tmp_path / "a")


REFUSED = {
    "lora_bias": (dict(target_modules=QV, lora_bias=True), "its lora_bias is True"),
    "DoRA of an embedding": (dict(target_modules=["embed_tokens"], use_dora=True), "use_dora for"),
    "a head that took from the base": (
        dict(target_modules=["lm_head", "q_proj"], init_lora_weights="pissa"),
        "adapter of lm_head with init_lora_weights='pissa'",
    ),
    "a random start": (
        dict(target_modules=QV, init_lora_weights="pissa_niter_4"),
        "'pissa_niter_4', which takes a random approximation off the base, another one each time",
    ),
    "layers again": (
        dict(target_modules=QV, layer_replication=[[0, 2], [1, 3]]),
        "its layer_replication is",
    ),
    "activated": (
        dict(target_modules=QV, alora_invocation_tokens=[3, 4]),
        "its alora_invocation_tokens is",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_by_name(case, tmp_path):
    options, message = REFUSED[case]
    config = theirs_of_adapters.LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = theirs_of_adapters.get_peft_model(base_of("tied"), config)
        model.save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        peft.load(ours_of("tied"), tmp_path / "a")


@pytest.mark.parametrize("target", ["patch_embedding", "position_embedding"])
def test_parts_of_a_tower_that_are_no_linear_maps(target, tmp_path):
    made("images", tmp_path / "a", target_modules=[target])
    with pytest.raises(CheckpointError, match=f"no place for: vision_tower.embeddings.{target}"):
        peft.load(ours_of("images"), tmp_path / "a")


def test_all_linear_of_streams_is_refused_by_name(tmp_path):
    """It adapts coefficients that are no projections here."""
    made("streams", tmp_path / "a", target_modules="all-linear")
    with pytest.raises(CheckpointError, match="no place for: layers.0.altup.correction_coefs"):
        peft.load(ours_of("streams"), tmp_path / "a")


def test_a_text_model_takes_the_text_part_of_an_adapter(tmp_path):
    made("images", tmp_path / "a", **SAID["all linear"])
    text = load_model(folder_of("images"), dtype="float32", text_only=True)
    whole = peft.load(ours_of("images"), tmp_path / "a")
    tokens = tiny.host(rows("images"), np.int32)
    np.testing.assert_allclose(
        tiny.run(peft.load(text, tmp_path / "a"), tokens).logits,
        tiny.run(whole, tokens).logits,
        **CLOSE,
    )
