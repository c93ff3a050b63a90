"""Several samples from one prefill, and log-probabilities, against calls of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import sampling


NEW, SAMPLES, TOP = 11, 3, 2
MODEL = tiny.model(tiny.GEMMA3)
PROMPTS = np.full((2, 7), -1)
PROMPTS[0, :3] = tiny.tokens(3, seed=3)
PROMPTS[1] = tiny.tokens(7, seed=7)
CHOOSE = sampling.make_sampler(
    temperature=1.5,
    top_k=13,
    top_p=0.95,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={4: 1.0},
    forbid=[9],
)
KEY = jax.random.key(11)
STOP = 17


@pytest.fixture(scope="module")
def generated() -> sampling.Generated:
    return sampling.generate(
        MODEL,
        jnp.asarray(PROMPTS),
        max_new_tokens=NEW,
        sampler=CHOOSE,
        key=KEY,
        stop_tokens=[STOP],
        num_samples=SAMPLES,
        top_logprobs=TOP,
    )


def texts(generated) -> list[tuple[int, int, list[int], list[int]]]:
    """Row, sample, prompt and answer of each text."""
    return [
        (
            row,
            sample,
            [token for token in PROMPTS[row].tolist() if token >= 0],
            [token for token in generated.tokens[row, sample].tolist() if token >= 0],
        )
        for row in range(2)
        for sample in range(SAMPLES)
    ]


def log_probs(prompt: list[int], answer: list[int]) -> np.ndarray:
    """Of every token of the vocabulary at every place of the answer, from one pass over all."""
    # One length for all texts, so that one program serves them; nothing looks ahead.
    text = np.zeros(7 + NEW, int)
    text[: len(prompt + answer)] = prompt + answer
    logits = np.asarray(tiny.run(MODEL, jnp.asarray(text)).logits, np.float64)
    logits = logits[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.slow
def test_samples_are_the_calls_with_folded_keys(generated):
    for sample in range(SAMPLES):
        alone = sampling.generate(
            MODEL,
            jnp.asarray(PROMPTS),
            max_new_tokens=NEW,
            sampler=CHOOSE,
            key=jax.random.fold_in(KEY, sample),
            stop_tokens=[STOP],
        )
        assert alone.logprobs is None
        np.testing.assert_array_equal(generated.tokens[:, sample], alone.tokens)
        for forked, single in zip(
            jax.tree.leaves(generated.cache), jax.tree.leaves(alone.cache), strict=True
        ):
            # Sums of some hundred float32 products, in another order for another batch.
            np.testing.assert_allclose(forked[:, sample], single, rtol=0, atol=2e-5)
    answers = {(row, *answer) for row, _, _, answer in texts(generated)}
    assert len(answers) == 2 * SAMPLES, "samples of one prompt must differ"
    assert any(len(answer) <= NEW for answer in answers), "one of the texts must have been stopped"


def test_penalties_see_prompt_and_answer(generated):
    for _, sample, prompt, answer in texts(generated):
        key = jax.random.fold_in(KEY, sample)
        for step, token in enumerate(answer):
            place = len(prompt) + step
            seen = np.full(7 + NEW, -1)
            seen[:place] = prompt + answer[:step]
            logits = tiny.run(MODEL, jnp.asarray(np.maximum(seen, 0))).logits[place - 1]
            assert token == _sampled(logits, jnp.asarray(seen), jax.random.fold_in(key, step))


@jax.jit
def _sampled(logits, seen, key):
    return CHOOSE(logits, seen, key)


def test_log_probabilities_are_the_models_own(generated):
    kept = generated.logprobs
    assert kept.chosen.shape == (2, SAMPLES, NEW)
    assert kept.top.shape == kept.top_tokens.shape == (2, SAMPLES, NEW, TOP)
    for row, sample, prompt, answer in texts(generated):
        expected = log_probs(prompt, answer)
        places, length = np.arange(len(answer)), len(answer)
        chosen, top, ids = (np.asarray(leaf[row, sample]) for leaf in jax.tree.leaves(kept))
        # Logits of about 10, through some hundred float32 operations.
        np.testing.assert_allclose(chosen[:length], expected[places, answer], atol=2e-5)
        order = np.argsort(-expected, axis=-1)[:, :TOP]
        np.testing.assert_array_equal(ids[:length], order)
        np.testing.assert_allclose(top[:length], np.take_along_axis(expected, order, -1), atol=2e-5)
        assert (chosen[length:] == 0).all() and (top[length:] == 0).all()
        assert (ids[length:] == -1).all()


@pytest.mark.slow
def test_streaming_several_samples(generated):
    steps = list(
        sampling.stream(
            MODEL,
            jnp.asarray(PROMPTS),
            max_new_tokens=NEW,
            sampler=CHOOSE,
            key=KEY,
            stop_tokens=[STOP],
            num_samples=SAMPLES,
        )
    )
    np.testing.assert_array_equal(np.stack(steps, -1), generated.tokens[..., : len(steps)])


@pytest.mark.slow
def test_a_forked_cache_goes_on_like_the_original():
    prompt = jnp.asarray(PROMPTS[1])
    cache = tiny.run(MODEL, prompt[:4], cache=eg.init_cache(MODEL.config, capacity=20)).cache
    assert cache is not None
    forked = sampling.fork(cache, 2)
    assert forked.length.tolist() == [4, 4]
    rest = jnp.broadcast_to(prompt[4:], (2, 3))
    single = tiny.run(MODEL, prompt[4:], cache=cache).logits
    # The same sums in another order.
    np.testing.assert_allclose(tiny.run(MODEL, rest, cache=forked).logits[1], single, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"top_logprobs": -1}, "top_logprobs must be at least 0, got -1"),
        (
            {"sampler": sampling.Greedy(sampling.forbid([2, tiny.VOCAB]))},
            f"bias is given for token {tiny.VOCAB}, which is not in the vocabulary",
        ),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sampling.generate(MODEL, tiny.tokens(3), max_new_tokens=2, **options)


def test_a_fork_into_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one copy, got 0"):
        sampling.fork(eg.init_cache(MODEL.config, capacity=3), 0)
