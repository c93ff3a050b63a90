"""Where images go in a text, who sees whom there, and what the tower does with pixels."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import nn
from equigemma.config import SigLIPConfig
from equigemma.nn import _siglip, _vision


CONFIG = tiny.GEMMA3_SEEING
MODEL = tiny.model(CONFIG)
# 29 is the start of an image, 30 its end, 28 a newline; an image has 4 soft tokens.
TOKENS = np.array([[2, 29, 5, 6, 29, 7], [2, 3, 4, 29, 5, -1]])
INSERTED = [
    [2, 28, 29, -2, -3, -4, -5, 30, 28, 5, 6, 28, 29, -6, -7, -8, -9, 30, 28, 7],
    [2, 3, 4, 28, 29, -2, -3, -4, -5, 30, 28, 5, -1, -1, -1, -1, -1, -1, -1, -1],
]


def pictures(*shape: int, seed: int = 0) -> jax.Array:
    return tiny.host(np.random.default_rng(seed).integers(0, 256, (*shape, 3)), np.uint8)


@pytest.mark.slow
def test_insert_by_hand():
    tokens = tiny.host(TOKENS, np.int32)
    assert nn.insert_image_tokens(tokens, tiny.VISION, 2).tolist() == INSERTED
    assert nn.indices_after_insertion(tokens, tiny.VISION, 2).tolist() == [
        [0, 1, 9, 10, 11, 19],
        [0, 1, 2, 3, 11, 12],
    ]
    # No batch, and more images than there is a place for.
    alone = nn.insert_image_tokens(tokens[1], tiny.VISION, 1, padding=0).tolist()
    assert alone == INSERTED[1][:12] + [-1]
    # Starts beyond the number of images are text.
    assert nn.insert_image_tokens(tokens[0], tiny.VISION, 1).tolist() == INSERTED[0][:11] + [29, 7]
    assert nn.insert_image_tokens(tokens[0], tiny.VISION, 0).tolist() == TOKENS[0].tolist()


def test_ends_of_blocks_by_hand():
    tokens = tiny.host(INSERTED[0], np.int32)
    positions = tiny.host(np.arange(20) + 100, np.int32)
    ends = _vision.block_end(tokens, positions, 4)
    expected = [100, 101, 102, *[106] * 4, *range(107, 113), *[116] * 4, 117, 118, 119]
    assert ends.tolist() == expected


@pytest.mark.parametrize("window", [None, 2, 3, 30])
def test_who_sees_whom(window):
    # Exactly what a pair of loops says, from the block numbers rather than from their ends.
    tokens = np.asarray(INSERTED[0])
    block = np.where(tokens < -1, (-2 - tokens) // 4, -1)
    expected = np.zeros((20, 20), bool)
    for q in range(20):
        for k in range(20):
            same = block[q] >= 0 and block[q] == block[k]
            near = window is None or abs(q - k) < window
            expected[q, k] = (k <= q or same) and near
    positions = tiny.host(np.arange(20), np.int32)
    ends = _vision.block_end(tiny.host(tokens, np.int32), positions, 4)
    see = partial(nn._mask.attention_mask, positions, positions, window)
    np.testing.assert_array_equal(see("causal_bidirectional_images", ends), expected)
    causal = np.tril(np.ones((20, 20), bool)) & (expected | expected.T)
    np.testing.assert_array_equal(see("causal", ends), causal)
    np.testing.assert_array_equal(see("causal_bidirectional_images", None), causal)


@pytest.mark.slow
def test_layers_decide_for_themselves():
    # As in Gemma 4: the tokens of an image attend to each other in local layers only.
    local, global_ = CONFIG.layers
    strict = replace(global_, attention=replace(global_.attention, mask_kind="causal"))
    tokens = tiny.host(INSERTED[0][:9], np.int32)
    soft = tiny.normal(3, 1, 4, tiny.WIDTH)

    def reach(*layers) -> np.ndarray:
        """Which soft tokens the hidden state of the image's first one depends on."""
        config = replace(CONFIG, layers=layers)
        model = tiny.model(config)

        @eqx.filter_jit
        def grad(soft):
            return jax.jacobian(lambda soft: model.trunk(tokens, soft_tokens=soft)[0][3])(soft)

        return np.abs(np.asarray(grad(soft))).max(axis=(0, 1, 3)) > 1e-6

    assert reach(local).tolist() == [True] * 4
    assert reach(strict).tolist() == [True, False, False, False]
    assert reach(global_).tolist() == [True] * 4
    assert reach(strict, strict).tolist() == [True, False, False, False]


@pytest.mark.slow
def test_a_batch_gives_what_each_row_gives_alone():
    tokens, images = tiny.host(TOKENS, np.int32), pictures(2, 2, 9, 17)
    together = tiny.run(MODEL, tokens, images=images).logits
    real = TOKENS >= 0
    for row in range(2):
        alone = tiny.run(MODEL, tokens[row], images=images[row]).logits
        # The same sums in the same order, but for products that XLA splits by the number of rows.
        np.testing.assert_allclose(alone[real[row]], together[row][real[row]], atol=2e-5)
    mapped = eqx.filter_jit(eqx.filter_vmap(lambda t, i: MODEL(t, images=i).logits))
    np.testing.assert_allclose(mapped(tokens, images)[real], together[real], atol=2e-5)


def test_one_image_for_each_row_needs_no_axis_for_it():
    tokens = tiny.host([[2, 29, 5], [3, 29, 4]], np.int32)
    images = pictures(2, 7, 5)
    np.testing.assert_array_equal(
        tiny.run(MODEL, tokens, images=images).logits,
        tiny.run(MODEL, tokens, images=images[:, None]).logits,
    )


def test_large_images_are_looked_at_in_groups(monkeypatch):
    images = pictures(2, 12, 12)
    whole = tiny.call(MODEL, "encode_images", images)
    monkeypatch.setattr(_siglip, "QUERIES", 8)  # of 36 patches, 4 at a time
    grouped = jax.jit(lambda images: MODEL.encode_images(images))(images)
    # The same products of other shapes; soft tokens are of size 10.
    np.testing.assert_allclose(grouped, whole, atol=1e-4)


def test_what_the_tower_computes_does_not_depend_on_the_dtype_of_weights():
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MODEL)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    images = pictures(12, 12)
    soft = tiny.call(narrow, "encode_images", images)
    assert soft.dtype == jnp.float32
    # Only the order of sums may differ.
    np.testing.assert_allclose(soft, tiny.call(wide, "encode_images", images), rtol=1e-4, atol=1e-4)
    fresh = jax.eval_shape(
        lambda: eg.Transformer(CONFIG, key=jax.random.key(0), dtype=jnp.bfloat16)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh.vision)} == {jnp.dtype("float32")}
    assert fresh.dtype == jnp.bfloat16


def test_colours_and_sizes():
    images = jnp.full((1, 1, 3), 255, jnp.uint8)
    # The weights of the resizing add up to 1 in float32.
    np.testing.assert_allclose(nn.preprocess_images(images, 5), np.ones((5, 5, 3)), atol=1e-6)
    np.testing.assert_allclose(nn.preprocess_images(images * 0, 5), -np.ones((5, 5, 3)), atol=1e-6)
    # At its own size nothing is resized.
    images = pictures(2, 5, 5)
    expected = (np.float32(images) - 127.5) / 127.5
    np.testing.assert_allclose(nn.preprocess_images(images, 5), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pixels": 13}, "must divide pixels"),
        ({"num_soft_tokens": 5}, "the square of a divisor"),
        ({"num_soft_tokens": 16}, "the square of a divisor"),
        ({"heads": 4}, "heads must divide its width; got 4 and 15"),
        ({"layers": 0}, "layers must be positive"),
    ],
)
def test_towers_that_cannot_be(change, says):
    with pytest.raises(ValueError, match=says):
        replace(tiny.VISION, **change)


def test_the_published_tower():
    config = SigLIPConfig()
    assert (config.side, config.num_soft_tokens) == (64, 256)


@pytest.mark.parametrize("cut", [4, 5, 6])
def test_a_part_of_an_image_is_refused(cut):
    soft = tiny.normal(0, 2, 4, tiny.WIDTH)
    for part in (INSERTED[0][:cut], INSERTED[0][cut:]):
        with pytest.raises(ValueError, match="this call got a part of one"):
            MODEL.trunk(tiny.host(part, np.int32), soft_tokens=soft)


def test_more_soft_tokens_than_images():
    soft = tiny.normal(0, 1, 4, tiny.WIDTH)
    with pytest.raises(ValueError, match=r"soft token 7, and 1 image\(s\) have 4 each"):
        MODEL.trunk(tiny.host(INSERTED[0], np.int32), soft_tokens=soft)


def test_a_model_of_text_says_so():
    text = tiny.model(tiny.GEMMA3)
    with pytest.raises(ValueError, match="this model reads text only: it has no vision tower"):
        text(tiny.host(TOKENS[0], np.int32), images=pictures(1, 5, 5))
