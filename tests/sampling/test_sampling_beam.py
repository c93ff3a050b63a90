"""Beam search against lists of texts in plain Python, each run through the model from its start."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma import sampling


NEW, BEAMS = 5, 3
MODEL = tiny.model(tiny.GEMMA3)
PROMPTS = np.full((2, 7), -1)
PROMPTS[0, :3] = tiny.tokens(3, seed=3)
PROMPTS[1] = tiny.tokens(7, seed=7)
LENGTH = 7 + NEW


def log_probs(text: tuple[int, ...]) -> np.ndarray:
    """Of every token after a text."""
    padded = np.zeros(LENGTH, int)
    padded[: len(text)] = text
    logits = np.asarray(tiny.run(MODEL, jnp.asarray(padded)).logits[len(text) - 1], np.float64)
    return logits - np.log(np.exp(logits).sum())


def search(prompt, *, beams, steps, penalty, stop, change=lambda log_probs, text: log_probs):
    """Texts and scores, best first."""
    going = [(0.0, tuple(prompt))]
    ended = []
    for step in range(1, steps + 1):
        ways = [
            (total + gain, (*text, token))
            for total, text in going
            for token, gain in enumerate(change(log_probs(text), text))
        ]
        ways = sorted(ways, reverse=True)[: max(2, 1 + len(stop)) * beams]
        over = [text[-1] in stop or step == steps for _, text in ways]
        for (total, text), ends in list(zip(ways, over, strict=True))[:beams]:
            if ends:
                ended.append((total / step**penalty, text[len(prompt) :]))
        ended = sorted(ended, reverse=True)[:beams]
        going = [way for way, ends in zip(ways, over, strict=True) if not ends][:beams]
        if len(ended) == beams and (not going or going[0][0] / step**penalty <= ended[-1][0]):
            break
    return [text for _, text in ended], [score for score, _ in ended]


def check(result, row, texts, scores):
    found = [[token for token in beam if token >= 0] for beam in result.tokens[row].tolist()]
    assert found == [list(text) for text in texts]
    # Sums of a few log-probabilities of some hundred float32 operations each.
    np.testing.assert_allclose(result.scores[row], scores, rtol=0, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.5])
def test_beams_are_those_of_a_search_over_whole_texts(penalty):
    stop = [5, 16, 23]
    result = sampling.beam_search(
        MODEL,
        jnp.asarray(PROMPTS),
        num_beams=BEAMS,
        max_new_tokens=NEW,
        length_penalty=penalty,
        stop_tokens=stop,
    )
    assert result.tokens.shape == (2, BEAMS, NEW)
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        texts, scores = search(
            prompt[prompt >= 0].tolist(), beams=BEAMS, steps=NEW, penalty=penalty, stop=stop
        )
        check(result, row, texts, scores)
        lengths |= {len(text) for text in texts}
    if penalty <= 1:
        assert len(lengths) > 1, "a stop token must have ended one of the texts"


def test_as_many_beams_as_texts_find_the_best_of_all():
    prompt = jnp.asarray(PROMPTS[1])
    result = sampling.beam_search(MODEL, prompt, num_beams=tiny.VOCAB, max_new_tokens=2)
    first = log_probs(tuple(PROMPTS[1].tolist()))
    sums = [
        (first[one] + gain, (one, two))
        for one in range(tiny.VOCAB)
        for two, gain in enumerate(log_probs((*PROMPTS[1].tolist(), one)))
    ]
    best = sorted(sums, reverse=True)[: tiny.VOCAB]
    assert [tuple(text) for text in result.tokens.tolist()] == [text for _, text in best]
    np.testing.assert_allclose(result.scores, [total / 2 for total, _ in best], atol=3e-5)


@pytest.mark.slow
def test_one_beam_without_a_stop_is_greedy():
    prompts = jnp.asarray(PROMPTS)
    result = sampling.beam_search(MODEL, prompts, num_beams=1, max_new_tokens=NEW)
    greedy = sampling.generate(MODEL, prompts, max_new_tokens=NEW, top_logprobs=0)
    np.testing.assert_array_equal(result.tokens[:, 0], greedy.tokens)
    assert greedy.logprobs is not None
    # The same sum, added in another order.
    np.testing.assert_allclose(result.scores[:, 0], greedy.logprobs.chosen.mean(-1), atol=1e-5)


def test_a_transform_sees_the_text_of_each_beam():
    penalty = sampling.presence_penalty(2.0)

    def change(log_probs, text):
        log_probs = log_probs.copy()
        log_probs[list(set(text))] -= 2.0
        return log_probs

    prompt = PROMPTS[1].tolist()
    result = sampling.beam_search(
        MODEL, jnp.asarray(PROMPTS[1]), num_beams=BEAMS, max_new_tokens=NEW, transform=penalty
    )
    texts, scores = search(prompt, beams=BEAMS, steps=NEW, penalty=1, stop=(), change=change)
    np.testing.assert_array_equal(result.tokens, texts)
    np.testing.assert_allclose(result.scores, scores, atol=3e-5)


def test_beams_that_cannot_exist_are_empty():
    transform = sampling.forbid([token for token in range(tiny.VOCAB) if token != 5])
    result = sampling.beam_search(
        MODEL, tiny.tokens(3), num_beams=2, max_new_tokens=3, transform=transform
    )
    assert result.tokens.tolist() == [[5, 5, 5], [-1, -1, -1]]
    assert np.isfinite(result.scores).tolist() == [True, False]


def test_no_beams_are_refused():
    with pytest.raises(ValueError, match="at least one beam, got num_beams=0"):
        sampling.beam_search(MODEL, tiny.tokens(3), num_beams=0, max_new_tokens=2)
