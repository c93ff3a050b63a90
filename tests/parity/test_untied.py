"""Untied heads against `transformers` and llama.cpp: loaded, trained, saved.

Of `transformers` both ways through folders; of a tied config with a head that differs, what it does
on loading. llama.cpp runs the files.
"""

import json
from pathlib import Path
from typing import Any

import formats
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import equigemma as eg
from equigemma import quantize, train
from equigemma.checkpoint import load_model


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from parity.test_checkpoints import CLOSE as CLOSE_TO_LLAMA_CPP  # noqa: E402
from parity.test_checkpoints import NO_TEXT, llama, logprobs, needs_llama  # noqa: E402


# Both sum in float32 in orders of their own; logits reach 30, layers are up to 7.
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-4)
VOCAB, LENGTH = 61, 13
SIZES = dict(
    vocab_size=VOCAB,
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
VISION = dict(
    hidden_size=15,
    intermediate_size=17,
    num_hidden_layers=1,
    num_attention_heads=5,
    image_size=12,
    patch_size=2,
)


def config_of(name: str, **options: Any):
    """A small config of theirs."""
    match name:
        case "gemma":
            return transformers.GemmaConfig(**SIZES, **options)
        case "gemma2":
            return transformers.Gemma2Config(**SIZES, **LOCAL, **options)
        case "gemma3":
            return transformers.Gemma3TextConfig(**SIZES, **LOCAL, **options)
        case "gemma3, images":
            return transformers.Gemma3Config(
                text_config=SIZES | LOCAL, vision_config=VISION, mm_tokens_per_image=4, **options
            )
        case "gemma3n":
            return transformers.Gemma3nTextConfig(
                **SIZES,
                **LOCAL,
                num_kv_shared_layers=0,
                activation_sparsity_pattern=[0.5, 0.0, 0.0],
                vocab_size_per_layer_input=VOCAB,
                hidden_size_per_layer_input=6,
                laurel_rank=3,
                **options,
            )
    return transformers.Gemma4TextConfig(
        **SIZES,
        **LOCAL,
        global_head_dim=20,
        hidden_size_per_layer_input=0,
        **options,
    )


NAMES = ["gemma", "gemma2", "gemma3", "gemma3, images", "gemma3n", "gemma4"]


def build(name: str, **options: Any):
    """Their model with numbers in every weight that matter."""
    config = config_of(name, **options)
    config._attn_implementation = "eager"
    auto = transformers.AutoModelForImageTextToText
    auto = auto if "images" in name else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" not in key and "scal" not in key:
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
    return model


def from_folder(folder: Path):
    """What they load, and the report on it."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    auto = transformers.AutoModelForImageTextToText
    auto = auto if kind == "gemma3" else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def tokens(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (2, LENGTH))


def of_theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens()), use_cache=False).logits.float().numpy()


def of_ours(model: eg.Transformer) -> np.ndarray:
    return np.asarray(tiny.run(model, tiny.host(tokens(), np.int32)).logits)


def is_tied(model) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head.weight.data_ptr() == embedding.weight.data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_theirs_here_and_ours_there(name, tmp_path):
    theirs = build(name, tie_word_embeddings=False)
    assert not is_tied(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", dtype="float32")
    assert ours.config.lm_head == "untied"
    expected = of_theirs(theirs)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(of_ours(ours), expected, **CLOSE)
    eg.save(ours, tmp_path / "ours")
    again = from_folder(tmp_path / "ours")
    assert not is_tied(again)
    np.testing.assert_array_equal(of_theirs(again), expected)


@pytest.mark.parametrize(
    ("name", "stored"),
    [*((name, "their own") for name in NAMES), ("gemma3, images", "old names")],
)
def test_a_tied_config_with_a_head_of_its_own(name, stored, tmp_path):
    """What a merged adapter of the head leaves behind: they compare, and so do we."""
    build(name, tie_word_embeddings=False).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(told))
    if stored == "old names":
        rename(tmp_path, lambda key: key.replace("model.language_model.", "language_model.model."))
        rename(tmp_path, lambda key: "language_model.lm_head.weight" if "lm_head" in key else key)
    theirs = from_folder(tmp_path)
    assert theirs.config.tie_word_embeddings and not is_tied(theirs)
    ours = load_model(tmp_path, dtype="float32")
    assert ours.config.lm_head == "untied"
    np.testing.assert_allclose(of_ours(ours), of_theirs(theirs), **CLOSE)


def rename(folder: Path, new) -> None:
    import safetensors.torch

    path = folder / "model.safetensors"
    named = {new(key): value for key, value in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(named, path, metadata={"format": "pt"})


def change(folder: Path, edit) -> None:
    import safetensors.torch

    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("case", ["equal", "head only", "embedding only"])
def test_a_tied_config_with_one_matrix(case, tmp_path):
    theirs = build("gemma3")
    theirs.save_pretrained(tmp_path)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"

    def edit(tensors):
        if case != "embedding only":
            tensors[head] = tensors[embedding]
        if case == "head only":
            del tensors[embedding]

    change(tmp_path, edit)
    again = from_folder(tmp_path)
    assert is_tied(again)
    ours = load_model(tmp_path, dtype="float32")
    assert ours.lm_head is None
    expected = of_theirs(theirs)
    np.testing.assert_array_equal(of_theirs(again), expected)
    np.testing.assert_allclose(of_ours(ours), expected, **CLOSE)


def test_what_is_said_inside_a_model_of_images_does_not_count(tmp_path):
    theirs = build("gemma3, images")
    theirs.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    told["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert is_tied(from_folder(tmp_path))
    assert load_model(tmp_path).lm_head is None


# Training.


@pytest.mark.parametrize("name", ["gemma2", "gemma3n"])
def test_losses_of_adamw_are_those_of_torch(name, tmp_path):
    theirs = build(name, tie_word_embeddings=False)
    with torch.no_grad():
        theirs.lm_head.weight.mul_(0.3)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype="float32")
    rate, expected, found = 1e-3, [], []
    optimizer = torch.optim.AdamW(theirs.train().parameters(), lr=rate, weight_decay=0.1)
    row = tokens()
    for _ in range(10):
        logits = theirs(input_ids=torch.as_tensor(row), use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.as_tensor(row[:, 1:]).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    texts = [train.Example(each, np.ones(len(each))) for each in row]
    batch = next(train.pack(texts, length=LENGTH, rows=2))
    with jax.numpy_dtype_promotion("standard"):
        mine = optax.adamw(rate, weight_decay=0.1)
        step = train.make_step(train.next_token_loss, mine)
        state = train.init(ours, mine)
        for _ in range(10):
            state, metrics = step(state, batch)
            found.append(float(metrics.loss))
    assert expected[-1] < expected[0] - 0.1
    # Float32 sums in another order, ten updates on.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    head = train.merge(state).lm_head.weight
    np.testing.assert_allclose(head, theirs.lm_head.weight.detach().numpy(), rtol=0, atol=1e-4)


# Few bits.


@pytest.mark.parametrize(
    "narrow",
    [quantize.int8, lambda model: quantize.int8(model, group_size=7), quantize.int4],
    ids=["int8", "int8 groups", "int4"],
)
@pytest.mark.parametrize("name", ["gemma3", "gemma3n"])
def test_they_compute_the_same_from_rounded_weights(name, narrow, tmp_path):
    build(name, tie_word_embeddings=False).save_pretrained(tmp_path / "x")
    model = narrow(load_model(tmp_path / "x", dtype="float32"))
    eg.save(model, tmp_path / "y", format="huggingface", dtype="float32")
    theirs = from_folder(tmp_path / "y")
    np.testing.assert_allclose(of_ours(model), of_theirs(theirs), **CLOSE)


# llama.cpp.

HEADS = {
    "gemma3": formats.CONFIGS["gemma3"],
    "gemma4 small": formats.NEWER["gemma4 small"],
    "gemma3, wide": formats.wide(formats.CONFIGS["gemma3"]),
}


@needs_llama
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gemma3", "float32"),
        ("gemma4 small", "float32"),
        ("gemma3, wide", "q8_0"),
        ("gemma3, wide", "bfloat16"),
    ],
)
def test_llama_cpp_gives_the_logits_of_the_head(name, dtype, tmp_path):
    from dataclasses import replace

    model, path = formats.model(replace(HEADS[name], lm_head="untied")), tmp_path / "x.gguf"
    eg.save(model, path, tokenizer=formats.tokenizer(), dtype=dtype)
    ours, tokenizer = eg.load(path, dtype="float32")
    assert ours.config.lm_head == "untied"
    assert not np.array_equal(ours.lm_head.weight, ours.embedding.weight)
    banned = [[index, False] for index in [*NO_TEXT, *range(tokenizer.vocab_size, formats.VOCAB)]]
    prompt = tokenizer.encode("lo <table> é\n the hotel hello the other")
    with llama(path) as ask:
        answer = ask(prompt=prompt, n_predict=7, n_probs=5, return_tokens=True, logit_bias=banned)
    expected = logprobs(ours, [*prompt, *answer["tokens"]])[len(prompt) - 1 : -1]
    steps = answer["completion_probabilities"]
    assert len(steps) == 7
    for step, row in zip(steps, expected, strict=True):
        for top in step["top_logprobs"]:
            assert abs(row[top["id"]] - top["logprob"]) < CLOSE_TO_LLAMA_CPP[dtype]


@needs_llama
def test_a_head_that_llama_cpp_would_not_take(tmp_path):
    """Why files of the first generations are refused: it does not load them."""
    import gguf

    path, other = tmp_path / "x.gguf", tmp_path / "y.gguf"
    model = formats.model(formats.CONFIGS["gemma2"])
    eg.save(model, path, tokenizer=formats.tokenizer())
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(other, "gemma2")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    head = np.asarray(jnp.flip(model.embedding.weight, 0))
    writer.add_tensor("output.weight", head)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    with pytest.raises(AssertionError, match="llama.cpp stopped"), llama(other):
        pass
    # Here it can only mean one thing.
    np.testing.assert_array_equal(load_model(other, dtype="float32").lm_head.weight, head)
