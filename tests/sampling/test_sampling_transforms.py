"""Each transform against a few lines of numpy in float64 that sort, count and loop."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equigemma import sampling
from equigemma._kernels import threshold_of


VOCAB = 1009  # More than are looked at before the search by bisection begins.
RNG = np.random.default_rng(0)
FLAT = RNG.normal(size=(2, 3, VOCAB)).astype(np.float32)
PEAKED = np.where(RNG.random((2, 3, VOCAB)) < 0.01, 9 * FLAT, FLAT)
MIXED = np.stack([FLAT[0], PEAKED[1]])
TIED = np.round(FLAT)
LOGITS = {"flat": FLAT, "peaked": PEAKED, "mixed": MIXED, "tied": TIED}

TOKENS = np.full((2, 3, 23), -1)
TOKENS[0, :, :7] = RNG.integers(0, VOCAB, (3, 7))
TOKENS[1, :, :19] = RNG.integers(0, 5, (3, 19))
TOKENS[1, 0, :3] = [0, VOCAB - 1, VOCAB - 1]


@jax.jit
def apply(transform, logits, tokens):
    return transform(logits, tokens)


def each_row(function, logits, tokens=TOKENS):
    rows = [
        function(row.astype(np.float64), [int(token) for token in seen if token >= 0])
        for row, seen in zip(logits.reshape(-1, VOCAB), tokens.reshape(6, -1), strict=True)
    ]
    return np.stack(rows).reshape(logits.shape)


def softmax(row):
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def best_to_reach(row, scores, share):
    """Row with −inf where `scores` are below that of the last token needed for `share`."""
    order = np.argsort(-scores, kind="stable")
    needed = np.searchsorted(np.cumsum(softmax(row)[order]), share)
    return np.where(scores >= scores[order[min(needed, len(row) - 1)]], row, -np.inf)


def top_k(row, k):
    return np.where(row >= np.sort(row)[-k], row, -np.inf)


def typical(row, share):
    surprise = -np.log(softmax(row))
    return best_to_reach(row, -np.abs(surprise - (softmax(row) * surprise).sum()), share)


def repetition(row, seen, factor):
    row = row.copy()
    for token in set(seen):
        row[token] = row[token] * factor if row[token] < 0 else row[token] / factor
    return row


def counted(row, seen, weigh):
    row = row.copy()
    for token, count in Counter(seen).items():
        row[token] -= weigh(count)
    return row


TRANSFORMS = {
    "temperature": (sampling.temperature(0.7), lambda row, seen: row / 0.7),
    "top_k 1": (sampling.top_k(1), lambda row, seen: top_k(row, 1)),
    "top_k 41": (sampling.top_k(41), lambda row, seen: top_k(row, 41)),
    "top_k of more than there are": (sampling.top_k(VOCAB + 1), lambda row, seen: row),
    "top_p 0.01": (sampling.top_p(0.01), lambda row, seen: best_to_reach(row, row, 0.01)),
    "top_p 0.5": (sampling.top_p(0.5), lambda row, seen: best_to_reach(row, row, 0.5)),
    "top_p 0.97": (sampling.top_p(0.97), lambda row, seen: best_to_reach(row, row, 0.97)),
    "top_p 1": (sampling.top_p(1.0), lambda row, seen: row),
    "min_p": (
        sampling.min_p(0.13),
        lambda row, seen: np.where(softmax(row) >= 0.13 * softmax(row).max(), row, -np.inf),
    ),
    "typical 0.2": (sampling.typical(0.2), lambda row, seen: typical(row, 0.2)),
    "typical 0.95": (sampling.typical(0.95), lambda row, seen: typical(row, 0.95)),
    "typical 1": (sampling.typical(1.0), lambda row, seen: row),
    "repetition 1.3": (sampling.repetition_penalty(1.3), lambda row, s: repetition(row, s, 1.3)),
    "repetition 0.7": (sampling.repetition_penalty(0.7), lambda row, s: repetition(row, s, 0.7)),
    "presence": (sampling.presence_penalty(0.6), lambda row, s: counted(row, s, lambda n: 0.6)),
    "frequency": (
        sampling.frequency_penalty(0.6),
        lambda row, s: counted(row, s, lambda n: 0.6 * n),
    ),
    "bias": (
        sampling.logit_bias({0: 2.0, 7: -1.5, VOCAB - 1: -np.inf}),
        lambda row, seen: row + [2, *[0] * 6, -1.5, *[0] * (VOCAB - 9), -np.inf],
    ),
    "forbid": (
        sampling.forbid(range(11)),
        lambda row, seen: np.where(np.arange(VOCAB) < 11, -np.inf, row),
    ),
}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_is_what_numpy_says(name, kind):
    transform, expected = TRANSFORMS[name]
    logits = LOGITS[kind]
    result = apply(transform, logits, TOKENS)
    # One or two float32 operations on numbers of about 10.
    np.testing.assert_allclose(result, each_row(expected, logits), rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_row_does_not_depend_on_its_neighbours(name, kind):
    transform, _ = TRANSFORMS[name]
    logits = LOGITS[kind]
    together = np.asarray(apply(transform, logits, TOKENS))
    alone = np.asarray(apply(transform, logits[1, 2], TOKENS[1, 2]))
    np.testing.assert_array_equal(alone, together[1, 2])


@pytest.mark.parametrize("cut", [sampling.top_p(0.9), sampling.typical(0.9), sampling.min_p(0.01)])
def test_what_was_ruled_out_stays_out(cut):
    transform = sampling.chain(sampling.forbid([3, 5]), sampling.top_k(7), cut)
    result = np.asarray(apply(transform, FLAT, TOKENS))
    kept = np.isfinite(result)
    assert not kept[..., [3, 5]].any()
    assert (kept.sum(-1) >= 1).all() and (kept.sum(-1) <= 7).all()
    np.testing.assert_array_equal(result[kept], FLAT[kept])


def test_top_p_after_top_k_is_relative_to_what_is_left():
    transform = sampling.chain(sampling.top_k(41), sampling.top_p(0.8))

    def expected(row, seen):
        row = top_k(row, 41)
        return best_to_reach(row, row, 0.8)

    np.testing.assert_array_equal(apply(transform, FLAT, TOKENS), each_row(expected, FLAT))


@pytest.mark.parametrize("share", [0.03, 0.4, 0.77, 0.999])
def test_bisection_ends_at_a_score_that_occurs(share):
    edges = [0.0, -0.0, -np.inf, 1e-40, -1e30, 1e30]
    scores = np.concatenate([FLAT[0, 0], edges], dtype=np.float32)
    probs = np.asarray(jax.nn.softmax(FLAT[0, 1, : len(scores) - 6]))
    probs = np.concatenate([probs, np.zeros(6, np.float32)])
    found = jax.jit(threshold_of)(scores, probs, jnp.float32(share))
    order = np.argsort(-scores, kind="stable")
    reached = np.cumsum(probs[order].astype(np.float64))
    assert found == scores[order[np.searchsorted(reached, share)]]


def test_the_vocabulary_is_never_sorted():
    transform = sampling.chain(sampling.top_k(64), sampling.top_p(0.9), sampling.typical(0.9))
    program = apply.lower(transform, FLAT, TOKENS).compile().as_text()
    assert program is not None
    assert "sort(" not in program


def test_another_number_is_no_reason_to_compile_again():
    @jax.jit
    def run(transform, logits, tokens):
        return transform(logits, tokens)

    for number in (0.3, 0.6):
        index = round(10 * number)
        run(
            sampling.chain(
                sampling.logit_bias({index: number, 2 * index: number}),
                sampling.repetition_penalty(number),
                sampling.presence_penalty(number),
                sampling.frequency_penalty(number),
                sampling.forbid(range(index)),
                sampling.temperature(number),
                sampling.top_p(number),
                sampling.min_p(number),
                sampling.typical(number),
            ),
            FLAT,
            TOKENS,
        )
    programs: Any = run
    assert programs._cache_size() == 1


def test_plain_functions_can_be_passed_into_jit():
    def negate(logits, tokens):
        return -logits

    for transform in (sampling.chain(negate, sampling.temperature(2.0)), negate):
        chosen = jax.jit(lambda sampler, x: sampler(x, jnp.array([-1]), None))(
            sampling.Greedy(transform), jnp.array([3.0, 1.0, 2.0])
        )
        assert chosen == 1


def test_the_first_of_equal_logits_is_chosen():
    logits = jnp.array([[1.0, 5.0, 5.0, 2.0], [-jnp.inf, -jnp.inf, 0.0, -1.0]])
    chosen = sampling.Greedy()(logits, jnp.full((2, 1), -1), None)
    assert chosen.tolist() == [1, 2]


def test_draws_are_those_of_jax_and_one_key_serves_all_rows():
    keys = jax.random.split(jax.random.key(3), 6).reshape(2, 3)
    tokens = jnp.full((2, 3, 1), -1)
    draw = jax.jit(sampling.Sample())
    expected = jax.vmap(jax.vmap(jax.random.categorical))(keys, FLAT)
    np.testing.assert_array_equal(draw(FLAT, tokens, keys), expected)
    same = jnp.broadcast_to(keys[0, 1], (2, 3))
    np.testing.assert_array_equal(draw(FLAT, tokens, keys[0, 1]), draw(FLAT, tokens, same))


def names(sampler: Any) -> list[str]:
    return [type(step).__name__ for step in sampler.transform.transforms]


def test_choice_chains_in_the_documented_order():
    chosen = sampling.make_sampler(
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        typical=0.8,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={3: 1.0},
        forbid=[4],
    )
    assert isinstance(chosen, sampling.Sample)
    assert names(chosen) == [
        "LogitBias",
        "RepetitionPenalty",
        "PresencePenalty",
        "FrequencyPenalty",
        "LogitBias",
        "Temperature",
        "TopK",
        "TopP",
        "MinP",
        "Typical",
    ]
    greedy = sampling.make_sampler(temperature=0.0, top_k=5, repetition_penalty=1.2)
    assert isinstance(greedy, sampling.Greedy)
    assert names(greedy) == ["RepetitionPenalty"]


def test_bfloat16_logits_stay_bfloat16():
    logits = jnp.asarray(FLAT[0], jnp.bfloat16)
    for transform, _ in TRANSFORMS.values():
        assert apply(transform, logits, TOKENS[0]).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (sampling.top_k, 0, "at least one token, got 0"),
        (sampling.top_p, 0.0, "top_p must be above 0 and at most 1, got 0.0"),
        (sampling.top_p, 1.5, "top_p must be above 0 and at most 1, got 1.5"),
        (sampling.min_p, float("nan"), "min_p must be above 0 and at most 1, got nan"),
        (sampling.typical, -1.0, "typical must be above 0 and at most 1, got -1.0"),
        (sampling.temperature, 0.0, "above 0, got 0.0; for 0 use Greedy"),
        (sampling.repetition_penalty, 0.0, "above 0, got 0.0; 1 changes nothing"),
        (sampling.presence_penalty, float("inf"), "presence penalty must be a finite number"),
        (sampling.frequency_penalty, float("nan"), "frequency penalty must be a finite number"),
        (sampling.logit_bias, {-1: 2.0}, "got 2.0 for the id -1"),
        (sampling.logit_bias, {3: float("inf")}, "got inf for the id 3"),
        (sampling.forbid, [5, -2], "got -inf for the id -2"),
    ],
)
def test_impossible_numbers_are_refused(make, value, message):
    with pytest.raises(ValueError, match=message):
        make(value)
