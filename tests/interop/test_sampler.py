"""DeepMind's samplers, driving their model and ours on the same real weights, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemma import gm

from equigemma import linen


THEIRS = gm.nn.Gemma3_270M(dtype=jnp.float32)
OURS = linen.Gemma3_270M(dtype=jnp.float32)
SIZES = {"cache_length": 96, "max_out_length": 16, "pad_length": 16}
PROMPT = "The capital of France is"
RAGGED = ["The capital of France is", "def fibonacci(n):", "One two three four five six"]

METHODS = {
    "greedy": gm.text.Greedy(),
    "random": gm.text.RandomSampling(temperature=0.9),
    "top-k": gm.text.TopkSampling(k=20),
    "top-p": gm.text.TopPSampling(p=0.8),
}


def sampler(model, params, tokenizer, method="greedy"):
    return gm.text.Sampler(
        model=model, params=params, tokenizer=tokenizer, sampling=METHODS[method], **SIZES
    )


def sample(model, params, tokenizer, prompt, method="greedy", **options):
    options = {"max_new_tokens": 12, "rng": jax.random.key(7), "return_state": True} | options
    return sampler(model, params, tokenizer, method).sample(prompt, **options)


@pytest.mark.parametrize("method", METHODS)
def test_same_tokens_for_every_sampling_method(params, tokenizer, method):
    theirs = sample(THEIRS, params, tokenizer, PROMPT, method)
    ours = sample(OURS, params, tokenizer, PROMPT, method)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    assert ours.text == theirs.text
    assert len(set(np.asarray(ours.tokens[:12]).tolist())) > 3


def test_same_tokens_for_a_ragged_batch(params, tokenizer):
    # With this release of JAX, a step of several rows in float32 takes two seconds.
    theirs = sample(THEIRS, params, tokenizer, RAGGED, max_new_tokens=4)
    ours = sample(OURS, params, tokenizer, RAGGED, max_new_tokens=4)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    assert ours.text == theirs.text


def test_the_cache_after_sampling_is_theirs(params, tokenizer):
    theirs = sample(THEIRS, params, tokenizer, PROMPT).state.cache
    ours = sample(OURS, params, tokenizer, PROMPT).state.cache
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for name in theirs:
        np.testing.assert_array_equal(ours[name]["end_index"], theirs[name]["end_index"])
        np.testing.assert_array_equal(ours[name]["positions"], theirs[name]["positions"])
        # Eighteen float32 layers, summed in another order.
        np.testing.assert_allclose(ours[name]["k"], theirs[name]["k"], atol=2e-3)
        np.testing.assert_allclose(ours[name]["v"], theirs[name]["v"], atol=2e-3)


def test_same_tokens_streamed(params, tokenizer):
    def tokens(model):
        stream = sampler(model, params, tokenizer).sample(
            PROMPT, max_new_tokens=6, stream=True, return_state=True
        )
        return [np.asarray(output.state.predicted_tokens) for output in stream]

    np.testing.assert_array_equal(tokens(OURS), tokens(THEIRS))


def test_same_tokens_in_the_next_turn(params, tokenizer):
    def turns(model):
        first = sample(model, params, tokenizer, PROMPT)
        second = sample(model, params, tokenizer, " And of Italy?", last_state=first.state)
        return [first.text, second.text]

    ours = turns(OURS)
    assert ours == turns(THEIRS)
    assert ours[0] != ours[1]


def test_same_conversation_through_the_chat_sampler(params, tokenizer):
    def replies(model):
        chat = gm.text.ChatSampler(
            model=model,
            params=params,
            tokenizer=tokenizer,
            multi_turn=True,
            # It pads prompts to 256 tokens and has no say in that.
            cache_length=512,
            max_out_length=16,
        )
        return [chat.chat(text, max_new_tokens=8) for text in ("Say one.", "Say two.")]

    assert replies(OURS) == replies(THEIRS)
