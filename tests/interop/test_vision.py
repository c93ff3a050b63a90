"""Gemma 3 with images: DeepMind's model and ours on the same random parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemma import gm
from gemma.gm.vision import _token_utils

from equigemma import linen, nn
from equigemma.config import SigLIPConfig


try:
    from gemma.multimodal import vision, vision_utils
except ModuleNotFoundError:  # moved in gemma 4
    from gemma.gm.nn.vision import _vision as vision
    from gemma.gm.nn.vision import _vision_utils as vision_utils


START = 255_999
# Ids reach up to that of the end of an image; all other sizes are tiny.
SMALL = {"num_embed": 256_007, "embed_dim": 12, "hidden_dim": 17, "head_dim": 8}
ENCODER = vision.SigLiPFromPatches(
    siglip_encoder=vision_utils.ViTModel(
        patch_size=(2, 2), width=15, depth=2, mlp_dim=17, num_heads=5
    ),
    siglip_exit=vision.VisionExit(output_length=4),
    num_mm_tokens_per_image_prepool=36,
    num_mm_tokens_per_image=4,
    image_height=12,
    image_width=12,
)
TOKENS = jnp.array(
    [
        [2, 5, START, 7, 8, START, 9, 10, 11],
        [2, START, 3, 4, 5, 6, 0, 0, 0],
        [2, 3, 4, 5, 6, 7, 8, 0, 0],
    ]
)


@pytest.fixture(scope="module")
def models():
    config = dataclasses.replace(
        gm.nn.Gemma3_4B.config,
        **SMALL,
        num_heads=2,
        num_kv_heads=1,
        sliding_window_size=5,
        attention_types=gm.nn.Gemma3_4B.config.attention_types[4:7],
        vision_encoder=ENCODER,
    )
    theirs = gm.nn.Transformer(config=config, dtype=jnp.float32, tokens="unused")
    ours = linen.Transformer.from_upstream(config, text_only=False, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), TOKENS)
    # Of norms and biases too: fresh ones are ones and zeros.
    variables = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape) * 0.3), shapes)
    return theirs, ours, variables


def images(*shape):
    return jnp.asarray(np.random.default_rng(1).integers(0, 256, shape), jnp.uint8)


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# Both compute in float32; logits are of size 10.
CLOSE = {"rtol": 0, "atol": 1e-4}


# Ids of one, two, three and four line ends, which a tokenizer of text makes of a longer run.
ONE, TWO, THREE, FOUR = 107, 108, 109, 110


@pytest.mark.parametrize(
    "row",
    [
        [2, ONE, START, 5],
        [2, TWO, START, TWO, 5],
        [2, START, START, 5],
        [2, START, ONE, START, FOUR],
        [THREE, START, START, THREE],
    ],
)
def test_line_ends_beside_an_image_stay_apart(row):
    tokens = jnp.asarray([row])
    theirs = _token_utils.add_extra_tokens_for_images(
        tokens, max_num_images=2, num_tokens_per_image=4
    )
    config = SigLIPConfig(pixels=12, patch=2, num_soft_tokens=4)
    ours = nn.insert_image_tokens(tokens, config, 2, padding=0)
    # Theirs has no number for a soft token.
    np.testing.assert_array_equal(jnp.where(ours < -1, -2, ours), theirs)


@pytest.mark.parametrize("name", ["Gemma3_4B", "Gemma3_12B", "Gemma3_27B"])
@pytest.mark.parametrize("text_only", [True, False])
def test_init_makes_their_tree(name, text_only):
    theirs, ours = (getattr(package, name)(text_only=text_only) for package in (gm.nn, linen))
    tokens = jnp.ones((2, 3), jnp.int32)
    expected = jax.eval_shape(theirs.init, jax.random.key(0), tokens)
    assert flat(jax.eval_shape(ours.init, jax.random.key(0), tokens)) == flat(expected)
    for field in ("support_images", "num_tokens_per_image"):
        assert getattr(ours.config.input_config, field) == getattr(
            theirs.config.input_config, field
        )
    # By default both have the tower.
    assert getattr(linen, name)().config.input_config.support_images
    assert getattr(gm.nn, name)().config.input_config.support_images


@pytest.mark.parametrize("shape", [(3, 2, 12, 12, 3), (3, 2, 31, 7, 3)])
def test_several_images_of_any_size(models, shape):
    theirs, ours, variables = models
    options = {"images": images(*shape), "return_hidden_states": True}
    expected = theirs.apply(variables, TOKENS, **options)
    output = ours.apply(variables, TOKENS, **options)
    real = np.asarray(TOKENS) != 0
    np.testing.assert_allclose(output.logits[real], expected.logits[real], **CLOSE)
    np.testing.assert_allclose(output.hidden_states[real], expected.hidden_states[real], **CLOSE)
    last = theirs.apply(variables, TOKENS, images=images(*shape), return_last_only=True)
    ours_last = ours.apply(variables, TOKENS, images=images(*shape), return_last_only=True)
    np.testing.assert_allclose(ours_last.logits, last.logits, **CLOSE)


def test_one_image_for_each_row_and_no_batch(models):
    theirs, ours, variables = models
    tokens = TOKENS[1:2]
    expected = theirs.apply(variables, tokens, images=images(1, 9, 5, 3)).logits
    output = ours.apply(variables, tokens, images=images(1, 9, 5, 3)).logits
    np.testing.assert_allclose(output[:, :6], expected[:, :6], **CLOSE)
    alone = ours.apply(variables, tokens[0], images=images(1, 9, 5, 3)[0]).logits
    np.testing.assert_allclose(alone[:6], output[0, :6], **CLOSE)


def test_cache_after_reading_images(models):
    theirs, ours, variables = models
    length = TOKENS.shape[1] + 2 * (4 + 3)
    filled = []
    for model in (theirs, ours):
        cache = model.init_cache(batch_size=3, dtype=jnp.float32, cache_length=length)
        output = model.apply(
            variables, TOKENS, images=images(3, 2, 12, 12, 3), cache=cache, return_last_only=True
        )
        filled.append(output.cache)
    expected, cache = filled
    assert flat(cache) == flat(expected)
    for ours_leaf, their_leaf in zip(
        jax.tree.leaves(cache), jax.tree.leaves(expected), strict=True
    ):
        # The first row has no padding anywhere.
        np.testing.assert_allclose(ours_leaf[0], their_leaf[0], **CLOSE)
