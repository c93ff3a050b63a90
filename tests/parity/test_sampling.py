"""Transforms and beam search against those of `transformers`."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma import sampling
from equigemma.config import RopeConfig


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
hf = pytest.importorskip("transformers.generation.logits_process")


VOCAB, ROWS, SEEN = 1009, 7, 29
RNG = np.random.default_rng(0)
FLAT = RNG.normal(size=(ROWS, VOCAB)).astype(np.float32)
PEAKED = np.where(RNG.random((ROWS, VOCAB)) < 0.01, 9 * FLAT, FLAT)
TOKENS = RNG.integers(0, 61, (ROWS, SEEN))

PAIRS = {
    "temperature": (sampling.temperature(0.7), lambda: hf.TemperatureLogitsWarper(0.7)),
    "top_k 1": (sampling.top_k(1), lambda: hf.TopKLogitsWarper(1)),
    "top_k 41": (sampling.top_k(41), lambda: hf.TopKLogitsWarper(41)),
    "top_p 0.1": (sampling.top_p(0.1), lambda: hf.TopPLogitsWarper(0.1)),
    "top_p 0.6": (sampling.top_p(0.6), lambda: hf.TopPLogitsWarper(0.6)),
    "top_p 0.97": (sampling.top_p(0.97), lambda: hf.TopPLogitsWarper(0.97)),
    "min_p 0.01": (sampling.min_p(0.01), lambda: hf.MinPLogitsWarper(0.01)),
    "min_p 0.3": (sampling.min_p(0.3), lambda: hf.MinPLogitsWarper(0.3)),
    "typical 0.2": (sampling.typical(0.2), lambda: hf.TypicalLogitsWarper(0.2)),
    "typical 0.9": (sampling.typical(0.9), lambda: hf.TypicalLogitsWarper(0.9)),
    "repetition 1.3": (
        sampling.repetition_penalty(1.3),
        lambda: hf.RepetitionPenaltyLogitsProcessor(1.3),
    ),
    "repetition 0.8": (
        sampling.repetition_penalty(0.8),
        lambda: hf.RepetitionPenaltyLogitsProcessor(0.8),
    ),
    "bias": (
        sampling.logit_bias({3: 2.5, 1008: -1.5}),
        lambda: hf.SequenceBiasLogitsProcessor([[[3], 2.5], [[1008], -1.5]]),
    ),
    "forbid": (
        sampling.forbid([5, 0, 700]),
        lambda: hf.SuppressTokensLogitsProcessor([5, 0, 700]),
    ),
}


@jax.jit
def apply(transform, logits, tokens):
    return transform(logits, tokens)


@pytest.mark.parametrize("logits", [FLAT, PEAKED], ids=["flat", "peaked"])
@pytest.mark.parametrize("name", PAIRS)
def test_transform(name, logits):
    transform, processor = PAIRS[name]
    expected = processor()(torch.tensor(TOKENS), torch.tensor(logits)).numpy()
    # Ours gets the tokens with empty places after them, as in a generation.
    tokens = np.pad(TOKENS, [(0, 0), (0, 11)], constant_values=-1)
    # One float32 division, product or sum; −inf in the same places.
    np.testing.assert_allclose(apply(transform, logits, tokens), expected, rtol=3e-7, atol=3e-7)


def hf_model():
    """The weights of a tiny Gemma 3 in both libraries."""
    local = tiny.layer(window=tiny.WINDOW, qk_norm=True, post_norm=True)
    whole = tiny.layer(qk_norm=True, post_norm=True, rope=RopeConfig(theta=1_000_000.0))
    # transformers wants a width that the number of heads divides.
    ours = replace(tiny.model_config(local, local, whole), width=18)
    model: Any = tiny.model(ours)
    attention: Any = local.attention
    config = transformers.Gemma3TextConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=ours.width,
        intermediate_size=tiny.HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=attention.heads,
        num_key_value_heads=attention.kv.heads,
        head_dim=attention.head_dim,
        query_pre_attn_scalar=attention.head_dim,
        sliding_window=tiny.WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.final_norm.scale,
    }
    for index, layer in enumerate(model.layers):
        key, value = layer.attention.projection.kv.weight
        gate, up = layer.ffw.gate.weight
        for name, weight in {
            "self_attn.q_proj": jnp.moveaxis(layer.attention.projection.q.weight, 1, 2),
            "self_attn.k_proj": jnp.moveaxis(key, 1, 2),
            "self_attn.v_proj": jnp.moveaxis(value, 1, 2),
            "self_attn.o_proj": layer.attention.output.weight.reshape(-1, ours.width).T,
            "self_attn.q_norm": layer.attention.query_norm.scale,
            "self_attn.k_norm": layer.attention.key_norm.scale,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.ffw.down.weight.T,
            "input_layernorm": layer.pre_attention_norm.scale,
            "post_attention_layernorm": layer.post_attention_norm.scale,
            "pre_feedforward_layernorm": layer.pre_ffw_norm.scale,
            "post_feedforward_layernorm": layer.post_ffw_norm.scale,
        }.items():
            rows = weight.reshape(-1, weight.shape[-1]) if weight.ndim > 1 else weight
            weights[f"model.layers.{index}.{name}.weight"] = rows
    theirs = transformers.Gemma3ForCausalLM(config).eval()
    missing, unexpected = theirs.load_state_dict(
        {name: torch.tensor(np.asarray(weight)) for name, weight in weights.items()}, strict=False
    )
    assert missing == ["lm_head.weight"] and not unexpected
    theirs.tie_weights()
    return model, theirs


@pytest.fixture(scope="module")
def models():
    return hf_model()


def test_both_models_are_the_same(models):
    ours, theirs = models
    tokens = tiny.tokens(2, 11)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(tokens))).logits.numpy()
    # Logits of about 10, from some hundred float32 operations in another order.
    np.testing.assert_allclose(tiny.run(ours, tokens).logits, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0])
def test_beam_search(models, penalty):
    ours, theirs = models
    tokens, beams, new, stop = tiny.tokens(3, 7, seed=3), 4, 13, list(range(4, 31, 3))
    expected = theirs.generate(
        torch.tensor(np.asarray(tokens)),
        attention_mask=torch.ones(3, 7, dtype=torch.int64),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=new,
        length_penalty=penalty,
        eos_token_id=stop,
        pad_token_id=tiny.VOCAB - 1,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    found = sampling.beam_search(
        ours, tokens, num_beams=beams, max_new_tokens=new, length_penalty=penalty, stop_tokens=stop
    )
    # Sums of a few log-probabilities, each from some hundred float32 operations.
    np.testing.assert_allclose(
        found.scores.reshape(-1), expected.sequences_scores, rtol=0, atol=1e-4
    )
    lengths = set()
    texts = np.asarray(found.tokens).reshape(3 * beams, new)
    for text, theirs_text in zip(texts, expected.sequences[:, 7:].numpy(), strict=True):
        length = int((text >= 0).sum())
        np.testing.assert_array_equal(theirs_text[:length], text[:length])
        assert (theirs_text[length:] == tiny.VOCAB - 1).all()
        lengths.add(length)
    if penalty < 1:
        assert min(lengths) < new, "some of the texts must have ended with a stop token"


def test_choice_applies_transforms_in_the_same_order_as_generate(models):
    _, theirs = models
    options = {
        "temperature": 0.8,
        "top_k": 51,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
    }
    processors = theirs._get_logits_processor(
        transformers.GenerationConfig(
            do_sample=True,
            typical_p=0.8,
            sequence_bias=[[[3], 2.5]],
            suppress_tokens=[7],
            **options,
        ),
        input_ids_seq_length=SEEN,
    )
    expected = processors(torch.tensor(TOKENS), torch.tensor(FLAT)).numpy()
    sampler = sampling.make_sampler(typical=0.8, logit_bias={3: 2.5}, forbid=[7], **options)
    assert isinstance(sampler, sampling.Sample)
    result = apply(sampler.transform, FLAT, TOKENS)
    # Three float32 operations on numbers of about 5.
    np.testing.assert_allclose(result, expected, rtol=3e-7, atol=3e-6)
    assert np.isfinite(result).sum(-1).min() > 1
