"""Generation on token ids, against a loop that runs the whole text again for every token."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import sampling
from equigemma._kernels import _while_loop
from equigemma.sampling import _generate, _request, _stream
from equigemma.sampling._request import validate_and_pad


NEW = 23
MODEL = tiny.model(tiny.GEMMA3)
PROMPTS = [np.asarray(tiny.tokens(size, seed=size)) for size in (1, 5, 41, 3)]


def padded(prompts) -> jax.Array:
    rows = np.full((len(prompts), max(map(len, prompts))), -1)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(rows)


def naive(prompt, sampler, key=None, count=NEW) -> list[int]:
    """No cache, no batch, no buckets: all tokens through the model for every new one."""
    # Of one length, so that there is one program: what comes later counts for nothing.
    seen = np.zeros(max(64, len(prompt) + count), int)
    sampler = eqx.filter_jit(sampler)
    seen[: len(prompt)] = prompt
    for index in range(count):
        at = len(prompt) + index
        logits = tiny.run(MODEL, jnp.asarray(seen)).logits[at - 1]
        step_key = None if key is None else jax.random.fold_in(key, index)
        seen[at] = sampler(logits, jnp.zeros(1, jnp.int32), step_key)
    return seen[len(prompt) : len(prompt) + count].tolist()


CHOICES = {
    "greedy": (sampling.Greedy(), None),
    "drawn": (sampling.make_sampler(temperature=1.3), jax.random.key(3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_ragged_batch_gives_what_each_row_gives_alone(choice):
    sampler, key = CHOICES[choice]
    together = sampling.generate(
        MODEL, padded(PROMPTS), max_new_tokens=NEW, sampler=sampler, key=key
    ).tokens
    for row, prompt in zip(together.tolist(), PROMPTS, strict=True):
        alone = sampling.generate(
            MODEL, jnp.asarray(prompt), max_new_tokens=NEW, sampler=sampler, key=key
        ).tokens
        assert row == naive(prompt, sampler, key)
        assert row == alone.tolist()


def test_drawn_rows_differ_with_their_keys_and_not_with_their_neighbours():
    prompt = PROMPTS[1]
    keys = jax.random.split(jax.random.key(5), 3)
    rows = sampling.generate(
        MODEL,
        jnp.asarray(np.stack([prompt] * 3)),
        max_new_tokens=NEW,
        sampler=sampling.make_sampler(temperature=2.0),
        key=keys,
    ).tokens.tolist()
    assert len({tuple(row) for row in rows}) == 3
    assert rows[2] == naive(prompt, sampling.make_sampler(temperature=2.0), keys[2])


def test_a_row_in_bfloat16_does_not_depend_on_what_its_neighbours_are():
    # The shape of a batch decides how sums are ordered, not what else is in it.
    narrow = jax.tree.map(lambda leaf: tiny.host(leaf, jnp.bfloat16), MODEL)
    pair = [
        sampling.generate(narrow, padded([PROMPTS[0], other]), max_new_tokens=NEW, top_logprobs=0)
        for other in (PROMPTS[1], PROMPTS[1][::-1])
    ]
    for left, right in zip(
        *map(jax.tree.leaves, [(p.tokens, p.logprobs) for p in pair]), strict=True
    ):
        np.testing.assert_array_equal(left[0], right[0])
        assert (np.asarray(left)[1] != np.asarray(right)[1]).any() or not left.size


def test_temperature_follows_the_softmax():
    logits = jnp.array([0.0, 1.0, 2.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    sampler = sampling.make_sampler(temperature=0.5)
    drawn = jax.jit(
        lambda keys: sampler(jnp.broadcast_to(logits, (20_000, 3)), _blank(20_000), keys)
    )
    counts = np.bincount(np.asarray(drawn(keys)), minlength=3) / 20_000
    # Four standard errors of a share near 1/2 in 20,000 draws.
    np.testing.assert_allclose(counts, np.exp([0, 2, 4]) / np.exp([0, 2, 4]).sum(), atol=0.015)


def test_transforms_apply_in_the_order_given():
    def add_one(logits, tokens):
        return logits + 1

    logits = jnp.array([1.0, 3.0])
    halve = sampling.temperature(2.0)
    tokens = jnp.zeros(1, jnp.int32)
    np.testing.assert_array_equal(sampling.chain(halve, add_one)(logits, tokens), [1.5, 2.5])
    np.testing.assert_array_equal(sampling.chain(add_one, halve)(logits, tokens), [1.0, 2.0])


def test_stop_token_ends_its_row_alone():
    free = sampling.generate(MODEL, padded(PROMPTS), max_new_tokens=NEW).tokens.tolist()
    stop = free[2][7]
    never = next(
        index for index in range(tiny.VOCAB) if index not in {i for row in free for i in row}
    )
    rows = sampling.generate(
        MODEL, padded(PROMPTS), max_new_tokens=NEW, stop_tokens=[stop, never]
    ).tokens
    for row, unstopped in zip(rows.tolist(), free, strict=True):
        end = unstopped.index(stop) + 1 if stop in unstopped else NEW
        assert row == unstopped[:end] + [-1] * (NEW - end)
    assert rows[2].tolist().count(-1) > 0, "the stop token must have cut at least this row"


@pytest.mark.slow
@pytest.mark.parametrize("batched", [True, False])
def test_stream_yields_what_generate_returns(batched):
    tokens = padded(PROMPTS) if batched else jnp.asarray(PROMPTS[1])
    whole = sampling.generate(MODEL, tokens, max_new_tokens=NEW).tokens
    stop = int(whole[2, 7]) if batched else int(whole[4])
    whole = sampling.generate(MODEL, tokens, max_new_tokens=NEW, stop_tokens=[stop]).tokens
    steps = np.stack(
        list(sampling.stream(MODEL, tokens, max_new_tokens=NEW, stop_tokens=[stop])), -1
    )
    np.testing.assert_array_equal(steps, whole[..., : steps.shape[-1]])
    assert (np.asarray(whole)[..., steps.shape[-1] :] == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 10, NEW])
def test_a_loop_in_runs_ends_as_one_step_by_step_does(limit, monkeypatch):
    # That of GPUs: runs of 4 steps, rows that stop within one, and limits within one.
    monkeypatch.setattr(_while_loop, "STEPS", 4)
    tokens, sampler = padded(PROMPTS), sampling.Greedy()
    free = sampling.generate(MODEL, tokens, max_new_tokens=NEW).tokens
    stop = [int(row[index]) for row, index in zip(free, (2, 5, 6, 9), strict=True)]
    for stops in (stop, stop[:2]):
        asked = {"max_new_tokens": NEW, "stop_tokens": stops, "sampler": sampler, "top_logprobs": 2}
        request = validate_and_pad(MODEL, tokens, cache=None, **asked)
        started = _request.start(MODEL, request, sampler)

        def ended(loop, request=request, started=started):
            step = partial(
                _generate.decode_step, MODEL, sampler=sampler, stop_tokens=request.stop_tokens
            )
            end = jnp.asarray(limit)
            body = partial(_generate._masked, step, end) if loop is _while_loop._in_runs else step
            goes_on = partial(_generate._unfinished, end)
            state = jax.jit(partial(loop, goes_on, body))(started)
            parts = (
                state.tokens,
                state.length,
                state.cache,
                _generate._shorten(state.logprobs, 1, NEW),
            )
            return jax.tree.map(np.asarray, parts)

        # Bit for bit: a finished row stays as it is.
        in_runs, one_by_one = ended(_while_loop._in_runs), ended(_while_loop._one_by_one)
        jax.tree.map(np.testing.assert_array_equal, in_runs, one_by_one)


def test_continuing_from_a_cache_is_continuing_the_text():
    text = jnp.asarray(PROMPTS[2])
    first, rest = text[:13], text[13:]
    cache = eg.init_cache(MODEL.config, capacity=100)
    cache = tiny.run(MODEL, first, cache=cache).cache
    forked = [
        sampling.generate(MODEL, rest, max_new_tokens=NEW, cache=cache).tokens for _ in range(2)
    ]
    whole = sampling.generate(MODEL, text, max_new_tokens=NEW).tokens
    np.testing.assert_array_equal(forked[0], whole)
    np.testing.assert_array_equal(forked[1], whole)


@pytest.mark.slow
def test_a_prompt_longer_than_one_pass_of_prefill():
    prompt = jnp.asarray(tiny.tokens(sampling.CHUNK + 77))
    generated = sampling.generate(MODEL, prompt, max_new_tokens=2).tokens
    assert generated.tolist() == naive(np.asarray(prompt), sampling.Greedy(), count=2)


@pytest.mark.slow
def test_any_prompt_length_costs_a_handful_of_programs():
    programs: Any = _generate._run
    before = programs._cache_size()
    for size in range(1, 300, 37):
        sampling.generate(MODEL, tiny.tokens(size), max_new_tokens=1 + size % 7)
    # Chunks of 32, 64, 128, 256, 512 tokens, and a cache of 256 or 512.
    assert programs._cache_size() - before <= 6


def test_one_trace_serves_a_whole_generation():
    traces = 0

    class Counting(sampling.AbstractSampler):
        def __call__(self, logits, tokens, key):
            nonlocal traces
            traces += 1
            return jnp.argmax(logits, -1).astype(jnp.int32)

    sampling.generate(MODEL, jnp.asarray(PROMPTS[0]), max_new_tokens=NEW, sampler=Counting())
    # Once for the token that prefill chooses, once in the body of the loop (traced twice by JAX to
    # find a fixed point of the carry's types).
    assert traces <= 3


@pytest.mark.slow
def test_steps_can_be_composed_under_jit_and_vmap():
    prompts = jnp.stack([tiny.tokens(5, seed=1), tiny.tokens(5, seed=2)])

    @jax.jit
    @jax.vmap
    def two_tokens(prompt):
        tokens = jnp.full(32, -1, jnp.int32).at[:5].set(prompt)
        cache = eg.init_cache(MODEL.config, capacity=32)
        stop = jnp.zeros(0, jnp.int32)
        greedy = sampling.Greedy()
        state = sampling.prefill(MODEL, tokens, cache, sampler=greedy, stop_tokens=stop, chunk=32)
        return sampling.decode_step(MODEL, state, sampler=greedy, stop_tokens=stop).tokens[5:7]

    expected = sampling.generate(MODEL, prompts, max_new_tokens=2).tokens
    np.testing.assert_array_equal(two_tokens(prompts), expected)


def test_streaming_steps_take_over_the_buffers_of_the_state():
    request = validate_and_pad(
        MODEL,
        tiny.tokens(5),
        max_new_tokens=3,
        stop_tokens=(),
        cache=None,
        sampler=sampling.Greedy(),
    )
    state = _request.start(MODEL, request, sampling.Greedy())
    _stream.advance(MODEL, state, sampling.Greedy(), request.stop_tokens)
    assert state.cache.layers[0].k.is_deleted()
    assert state.tokens.is_deleted()


def test_streaming_leaves_what_the_caller_gave_alone():
    key, cache = jax.random.key(3), eg.init_cache(MODEL.config, capacity=30)
    steps = sampling.stream(
        MODEL,
        jnp.asarray(PROMPTS[1]),
        max_new_tokens=2,
        sampler=sampling.make_sampler(temperature=1.3),
        key=key,
        cache=cache,
    )
    assert len(list(steps)) == 2
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((key, cache)))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([[3, 4], [-1, -1]], {}, "at least one token"),
        ([3, -1, 4], {}, "must come after the prompt"),
        ([tiny.VOCAB], {}, f"Token {tiny.VOCAB} is not in the vocabulary"),
        ([3], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([3], {"max_new_tokens": 10**8}, "max_new_tokens must be at most 1048576, got 100000000"),
        ([3], {"sampler": sampling.make_sampler(temperature=1.0)}, "pass key="),
    ],
)
def test_bad_arguments_are_named(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        sampling.generate(
            MODEL, jnp.asarray(tokens, jnp.int32), **({"max_new_tokens": 2} | options)
        )


def test_a_cache_without_room_names_both_numbers():
    cache = eg.init_cache(MODEL.config, capacity=10)
    with pytest.raises(ValueError, match="capacity of 10 tokens.*need 12"):
        sampling.generate(MODEL, tiny.tokens(8), max_new_tokens=5, cache=cache)


@pytest.mark.parametrize("value", [-0.5, float("nan")])
def test_impossible_temperatures_are_refused(value):
    with pytest.raises(ValueError, match=f"above 0, got {value}"):
        sampling.make_sampler(temperature=value)


def test_a_temperature_is_no_reason_to_compile_again():
    hot, cold = (eqx.filter_jit(sampling.make_sampler(temperature=value)) for value in (0.5, 2.0))
    assert jax.tree.structure(sampling.make_sampler(temperature=0.5)) == jax.tree.structure(
        sampling.make_sampler(temperature=2.0)
    )
    logits, tokens, key = jnp.array([0.0, 1.0]), jnp.zeros(1, jnp.int32), jax.random.key(0)
    assert hot(logits, tokens, key).dtype == cold(logits, tokens, key).dtype == jnp.int32


def _blank(rows: int) -> jax.Array:
    return jnp.zeros((rows, 1), jnp.int32)
