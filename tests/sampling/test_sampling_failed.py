"""Logits that are not finite: rows stop in compiled code, and on the host there is one sentence."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import sampling
from equigemma.nn._vision import PADDING
from equigemma.sampling import Greedy, NonFiniteLogitsError, Sample, chain, top_k


MODEL = tiny.model(tiny.GEMMA3)
WORDS = "No token can be chosen.* NaN or infinite.* bfloat16 or float32"


def spoiled(value: float, *ids: int) -> eg.Transformer:
    """The model with rows of its table that are not finite: what reads them is not finite either,
    and its logits for others are.
    """
    table = np.array(MODEL.embedding.weight)
    table[list(ids)] = value
    return eqx.tree_at(lambda model: model.embedding.weight, MODEL.untied(), jnp.asarray(table))


CHOICES = {
    "greedy": Greedy(),
    "drawn": Sample(),
    "from a few": Sample(chain(top_k(3), sampling.top_p(0.9), sampling.min_p(0.1))),
    "typical": Sample(sampling.typical(0.9)),
    "penalised": Greedy(sampling.repetition_penalty(1.3)),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_of_what_is_not_finite_is_no_token(name):
    logits = np.array(tiny.normal(0, 5, 7))
    logits[1], logits[2, 3], logits[3] = np.nan, np.nan, -np.inf
    tokens = np.full((5, 4), PADDING, np.int32)
    tokens[:, 0] = 2
    sampler = jax.jit(lambda *arguments: CHOICES[name](*arguments))
    chosen = sampler(jnp.asarray(logits), jnp.asarray(tokens), jax.random.key(0))
    assert (np.asarray(chosen) >= 0).tolist() == [True, False, False, False, True]
    whole = sampler(tiny.normal(0, 5, 7), jnp.asarray(tokens), jax.random.key(0))
    assert np.asarray(chosen)[[0, 4]].tolist() == np.asarray(whole)[[0, 4]].tolist()


class Careless(sampling.AbstractSampler):
    """A choice of someone's own, which looks at nothing."""

    def __call__(self, logits, tokens, key):
        return jnp.full(logits.shape[:-1], 7)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [Greedy(), Careless()])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_compiled_steps_stop_the_rows_concerned(sampler, value):
    prompts = jnp.asarray([[2, 3, PADDING], [2, 5, 4], [2, 4, 3]])

    @jax.jit
    def run(model):
        tokens = jnp.pad(prompts, ((0, 0), (0, 5)), constant_values=PADDING)
        cache = eg.init_cache(model.config, (3,), capacity=8)
        stop = jnp.asarray([], jnp.int32)
        state = sampling.prefill(model, tokens, cache, sampler=sampler, stop_tokens=stop)
        return state, sampling.decode_step(model, state, sampler=sampler, stop_tokens=stop)

    first, second = run(spoiled(value, 5))
    assert first.failed.tolist() == second.failed.tolist() == [False, True, False]
    assert first.finished.tolist() == [False, True, False]
    assert first.last_token[1] == second.last_token[1] == -1
    assert second.length.tolist() == [4, 3, 5]
    assert second.tokens[1].tolist() == [2, 5, 4, *[PADDING] * 5]
    _, expected = run(MODEL.untied())
    np.testing.assert_array_equal(second.tokens[[0, 2], :5], expected.tokens[[0, 2], :5])


@pytest.mark.slow
def test_a_full_cache_stops_its_rows():
    @jax.jit
    def run(model, prompts):
        tokens = jnp.pad(prompts, ((0, 0), (0, 7)), constant_values=PADDING)
        state = sampling.prefill(
            model,
            tokens,
            eg.init_cache(model.config, (2,), capacity=4),
            sampler=Greedy(),
            stop_tokens=jnp.asarray([], jnp.int32),
        )
        step = partial(
            sampling.decode_step, model, sampler=Greedy(), stop_tokens=jnp.asarray([], jnp.int32)
        )
        return jax.lax.fori_loop(0, 3, lambda _, state: step(state), state)

    state = run(MODEL, jnp.asarray([[2, 3, 4], [2, PADDING, PADDING]]))
    # Three tokens and one more are in the cache; the next has no room.
    assert state.failed.tolist() == [True, False]
    assert state.length.tolist() == [5, 5]
    expected = sampling.generate(MODEL, [2, 3, 4], max_new_tokens=2).tokens
    assert state.tokens[0, 3:5].tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_on_the_host_it_is_an_error(value):
    model = spoiled(value, *range(tiny.VOCAB))
    for call in (
        lambda: sampling.generate(model, [2, 3], max_new_tokens=3),
        lambda: next(sampling.stream(model, [2, 3], max_new_tokens=3)),
        lambda: sampling.beam_search(model, [2, 3], num_beams=2, max_new_tokens=3),
    ):
        with pytest.raises(NonFiniteLogitsError, match=WORDS):
            call()


@pytest.mark.slow
def test_the_rows_are_named():
    model = spoiled(np.nan, 5)
    prompts = [[2, 3], [2, 5], [2, 4], [5, 2]]
    with pytest.raises(NonFiniteLogitsError, match="in row 1, 3: the logits"):
        sampling.generate(model, prompts, max_new_tokens=3)
    with pytest.raises(NonFiniteLogitsError, match=r"in row \(0, 0\), \(0, 1\): the logits"):
        sampling.generate(model, [[5, 2], [2, 4]], max_new_tokens=3, num_samples=2)
    with pytest.raises(NonFiniteLogitsError, match="in row 1, 3: the logits"):
        sampling.beam_search(model, prompts, num_beams=2, max_new_tokens=3)


def test_a_stream_gives_what_came_before():
    # The first token is chosen among finite logits, and reading it is what fails.
    firsts = {
        index: int(sampling.generate(MODEL, [index], max_new_tokens=1).tokens[0])
        for index in range(2, 9)
    }
    prompt, first = next(([index], first) for index, first in firsts.items() if index != first)
    steps = sampling.stream(spoiled(np.nan, first), prompt, max_new_tokens=3)
    assert next(steps) == first
    with pytest.raises(NonFiniteLogitsError, match="No token can be chosen: the logits"):
        next(steps)


def test_all_tokens_forbidden():
    sampler = Greedy(sampling.forbid(range(tiny.VOCAB)))
    with pytest.raises(NonFiniteLogitsError, match="or `sampler` forbids all tokens"):
        sampling.generate(MODEL, [2, 3], max_new_tokens=3, sampler=sampler)
