"""DeepMind's samplers, driving their model and ours on the same real weights, in float32.

All that a sampler can do is compared on tiny models, in `test_sampling.py`.
"""

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


@pytest.fixture(scope="module")
def outputs(params, tokenizer):
    """Of their model and ours, with one row and greedy."""
    return [
        gm.text.Sampler(model=model, params=params, tokenizer=tokenizer, **SIZES).sample(
            PROMPT, max_new_tokens=12, rng=jax.random.key(7), return_state=True
        )
        for model in (THEIRS, OURS)
    ]


def test_same_tokens(outputs):
    theirs, ours = outputs
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    assert ours.text == theirs.text
    assert len(set(np.asarray(ours.tokens[:12]).tolist())) > 3


def test_the_cache_after_sampling_is_theirs(outputs):
    theirs, ours = (output.state.cache for output in outputs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for name in theirs:
        np.testing.assert_array_equal(ours[name]["end_index"], theirs[name]["end_index"])
        np.testing.assert_array_equal(ours[name]["positions"], theirs[name]["positions"])
        # Eighteen float32 layers, summed in another order.
        np.testing.assert_allclose(ours[name]["k"], theirs[name]["k"], atol=2e-3)
        np.testing.assert_allclose(ours[name]["v"], theirs[name]["v"], atol=2e-3)


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
