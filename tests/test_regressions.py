"""What has gone wrong elsewhere in models of this family; each with the numbers that show it."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import lora, nn, sampling
from equigemma.config import NormConfig, OwnKVConfig, SharedKVConfig


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gemma3n", "gemma4 experts"])
def test_rows_of_a_batch_with_different_padding(name):
    # Padding before, after, on both sides and nowhere, in one batch: each as it is alone.
    model, length = tiny.model(tiny.CONFIGS[name]), 11
    tokens = np.asarray(tiny.tokens(4, length))
    positions = np.full(tokens.shape, -1)
    for row, (start, end) in enumerate([(0, 11), (4, 11), (0, 7), (2, 9)]):
        positions[row, start:end] = np.arange(end - start)
    together = tiny.run(
        model, tiny.host(tokens, np.int32), positions=tiny.host(positions, np.int32)
    ).logits
    for row in (1, 2, 3):
        real = positions[row] >= 0
        alone = tiny.run(model, tiny.host(tokens[row][real], np.int32)).logits
        # Sums over other numbers of masked keys; logits are of size 10.
        np.testing.assert_allclose(together[row][real], alone, atol=1e-4)


@pytest.mark.slow
def test_text_goes_on_past_the_window():
    # Gemma 3n turned to gibberish there: its sharing layers must see what the owner's ring holds.
    config = tiny.GEMMA3N
    model, length = tiny.model(config), 4 * tiny.WINDOW + 3
    tokens = tiny.tokens(length, seed=3)
    whole = tiny.run(model, tokens).logits
    cache = tiny.empty_cache(config, capacity=length)
    steps = tiny.run_in_chunks(model, tokens, [7] + [1] * (length - 7), cache=cache).logits
    np.testing.assert_allclose(steps, whole, atol=1e-4)  # sums in another order


@pytest.mark.slow
def test_adapters_of_layers_that_share_keys():
    config = tiny.GEMMA4_SMALL
    model = tiny.model(config)
    sharing = [
        index
        for index, layer in enumerate(config.layers)
        if isinstance(layer.attention.kv, SharedKVConfig)
    ]
    adapted = lora.add(model, rank=2, key=jax.random.key(0))
    for index in sharing:
        assert isinstance(adapted.layers[index].attention.query, lora.LoRAEinsum)
    tokens = tiny.tokens(2, 7)
    before = tiny.run(model, tokens).logits
    # A fresh adapter adds nothing.
    np.testing.assert_allclose(tiny.run(adapted, tokens).logits, before, atol=1e-5)

    # One that was trained counts, and counts the same when it is merged.
    trained = lora.replace(
        adapted,
        lambda path, einsum: (
            replace(einsum, up=jnp.ones_like(einsum.up))
            if path.startswith(f"layers.{sharing[0]}.attention.query")
            and isinstance(einsum, lora.LoRAEinsum)
            else einsum
        ),
    )
    after = tiny.run(trained, tokens).logits
    assert np.abs(np.asarray(after) - np.asarray(before)).max() > 1e-3
    np.testing.assert_allclose(tiny.run(lora.merge(trained), tokens).logits, after, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "local"),
    [("gemma4-31b", True), ("gemma4-31b", False), ("gemma4-26b-a4b", True), ("gemma4-e4b", True)],
)
def test_tokens_of_an_image_in_gemma_4(name, local):
    # Bidirectional in local layers of the large models; causal in global ones, and in small models.
    told = next(
        layer.attention
        for layer in eg.variants.get(name).layers
        if (layer.attention.window is not None) == local
    )
    made = tiny.newer_layer(OwnKVConfig(heads=1), window=tiny.WINDOW if local else None)
    made = replace(made, attention=replace(made.attention, mask_kind=told.mask_kind))
    config = tiny.model_config(made)
    model = tiny.model(config)
    tokens = tiny.host([2, *range(-2, -9, -1), 5], np.int32)  # 7 soft tokens, more than the window
    soft = tiny.normal(3, 1, 7, tiny.WIDTH)

    @eqx.filter_jit
    def grad(soft):
        return jax.jacobian(lambda soft: model.trunk(tokens, soft_tokens=soft)[0][1:8])(soft)

    sees = np.abs(np.asarray(grad(soft))).max(axis=(1, 2, 4)) > 1e-6
    query, key = np.indices((7, 7))
    near = (abs(query - key) < tiny.WINDOW) if local else True
    whole = local and name != "gemma4-e4b"
    np.testing.assert_array_equal(sees, near & (whole | (key <= query)))


@pytest.mark.parametrize("position", [8_191, 8_192, 10_007, 131_071])
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_rotation_of_bfloat16_past_8k(position, theta):
    # A position of 10,007 is 9,984 in bfloat16, and its angle is wrong by radians.
    head = 62
    x = np.random.default_rng(0).normal(size=(1, 1, head)).astype(jnp.bfloat16)
    rope = eg.config.RopeConfig(theta=theta)
    turn = nn.rope_sin_cos(jnp.asarray([position]), head, rope)
    ours = np.asarray(nn.apply_rope(jnp.asarray(x), *turn), np.float64)[0, 0]
    wide = x.astype(np.float64)[0, 0]
    angles = position * theta ** (-np.arange(head // 2) / (head // 2))
    first, second = np.split(wide, 2)
    exact = np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ]
    )
    # The result has 8 bits; angles of 1e5 radians are off by 1e-2 in float32.
    np.testing.assert_allclose(ours, exact, atol=0.03 if position < 100_000 else 0.06)


def test_temperature_zero_is_the_likeliest_token():
    model = tiny.model(tiny.GEMMA3)
    options = {"max_new_tokens": 5, "key": jax.random.key(0)}
    prompt = tiny.tokens(3)
    greedy = sampling.generate(model, prompt, sampler=sampling.Greedy(), **options).tokens
    for sampler in (sampling.make_sampler(temperature=0.0), sampling.make_sampler(temperature=0.0)):
        given = sampling.generate(model, prompt, sampler=sampler, **options).tokens
        np.testing.assert_array_equal(given, greedy)


def test_a_token_that_only_a_later_vocabulary_has():
    # Gemma 2 has 256,000 ids; that of the end of an image in Gemma 3 is one past them.
    model = tiny.model(tiny.GEMMA2)
    prompt = tiny.host([2, tiny.VOCAB, 5], np.int32)
    with pytest.raises(ValueError, match=f"Token {tiny.VOCAB} is not in the vocabulary"):
        sampling.generate(model, prompt, max_new_tokens=3)
    # Nor does text that spells one become it.
    with pytest.raises(ValueError, match="reads text only"):
        model(prompt, images=jnp.zeros((1, 3, 3, 3), jnp.uint8))


def test_float16_does_not_overflow():
    # Squares, sums and products of activations pass 65,504 long before the activations do.
    norm = nn.RMSNorm(1_021, NormConfig(), dtype=jnp.float16)
    x = tiny.normal(0, 3, 1_021) * 9_000
    exact = x / np.sqrt(np.mean(np.square(np.float64(x)), axis=-1, keepdims=True))
    np.testing.assert_allclose(norm(x.astype(jnp.float16)), exact, atol=4e-3)  # 11 bits of 4

    q = jnp.full((5, 2, 512), 30, jnp.float16)
    k = jnp.full((1, 5, 512), 30, jnp.float16)
    v = tiny.normal(1, 1, 5, 512, dtype=jnp.float16)
    mixed = nn.dot_product_attention(q, k, v, jnp.ones((5, 5), bool))  # each logit is 460,800
    mean = np.float32(v).mean(axis=1)
    np.testing.assert_allclose(mixed[0, 0], mean[0], atol=2e-3)  # 11 bits of values up to 4


def test_a_model_of_float16_with_a_large_stream():
    config = tiny.GEMMA3
    wide = tiny.model(config)
    # The stream of the published 270M reaches 1e4; so does this one.
    wide = eqx.tree_at(lambda model: model.embedding.weight, wide, replace_fn=lambda w: w * 3_000)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), wide)
    tokens = tiny.tokens(2, 7)
    hidden, _ = tiny.call(narrow, "trunk", tokens)
    expected, _ = tiny.call(wide, "trunk", tokens)
    assert np.isfinite(np.asarray(hidden, np.float32)).all()
    # 11 bits, through two layers; hidden states are of size 3.
    np.testing.assert_allclose(np.float32(hidden), np.float32(expected), atol=0.05)
