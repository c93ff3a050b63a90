"""Resizing, patches, their positions, and pooling, against Pillow, numpy and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from equigemma import nn
from equigemma.config import PatchConfig, VisionTransformerConfig
from equigemma.nn._patches import patchify, pool_by_position, position_embeddings
from equigemma.nn._resize import bicubic_weights


CONFIG = VisionTransformerConfig(
    width=20,
    layers=1,
    heads=1,
    head_dim=4,
    hidden=7,
    patch=2,
    positions=39,
    max_soft_tokens=5,
    budgets=(5, 13),
    video_soft_tokens=5,
)


def image(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(
    "before, after",
    [
        ((19, 23), (17, 5)),
        ((19, 23), (31, 53)),
        ((19, 23), (2, 2)),
        ((19, 23), (61, 1)),
        ((19, 23), (19, 7)),
        # The height first: it loses more than twice as much as the width, or the width gains.
        ((97, 31), (41, 4)),
        ((19, 23), (7, 97)),
        # The width first, once more: twice as much, and less.
        ((97, 31), (43, 4)),
        ((97, 31), (60, 4)),
    ],
    ids=str,
)
def test_resizing_equals_pillow(before, after):
    pillow = pytest.importorskip("PIL", reason="Pillow is the reference")
    from PIL import Image

    lost = before[0] - after[0], before[1] - after[1]
    if int(pillow.__version__.split(".")[0]) < 13 and lost[0] > max(0, 2 * lost[1]):
        pytest.skip("before version 13, Pillow always begins with the width")
    pixels = image(*before, 3)
    resized = nn.resize_bicubic(tiny.host(pixels, np.uint8), after)
    expected = Image.fromarray(pixels).resize(after[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized, np.asarray(expected))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(size=st.integers(1, 300), length=st.integers(1, 300))
def test_weights_of_a_line(size, length):
    """Each new pixel is a mean, and a line of one colour keeps it; a ramp keeps its slope."""
    first, weights = bicubic_weights(size, length)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    assert (first >= 0).all() and (first < size).all()
    if size == length:
        shown = np.zeros((length, size))
        for tap in range(weights.shape[1]):
            shown[np.arange(length), np.minimum(first + tap, size - 1)] += weights[:, tap]
        np.testing.assert_allclose(shown, np.eye(size), atol=1e-12)


def test_gradients_with_respect_to_pixels_of_a_resized_image():
    """Resizing is linear in floats, so a difference is the derivative up to rounding."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        before, step = (jnp.asarray(rng.uniform(size=(2, 11, 7, 3))) for _ in range(2))
        patches = nn.image_patches(before, CONFIG, 13)
        assert patches.pixel_values.dtype == jnp.float64
        cotangent = jnp.asarray(rng.normal(size=patches.pixel_values.shape))

        def value(images):
            return jnp.sum(nn.image_patches(images, CONFIG, 13).pixel_values * cotangent)

        gradient = jax.grad(value)(before)
        difference = (value(before + step) - value(before - step)) / 2
        np.testing.assert_allclose(jnp.sum(gradient * step), difference, rtol=1e-10)


RAW = PatchConfig(
    width=20, patch=6, positions=13, max_soft_tokens=5, budgets=(5, 13), video_soft_tokens=5
)


@pytest.mark.parametrize("config", [CONFIG, RAW], ids=["small patches", "raw patches"])
def test_images_of_one_size_at_once(config):
    images = tiny.host(image(2, 3, 19, 23, 3), np.uint8)
    together = nn.image_patches(images, config)
    single = nn.image_patches(images[1, 2], config)
    np.testing.assert_array_equal(together.pixel_values[1, 2], single.pixel_values)
    np.testing.assert_array_equal(together.positions[1, 2], single.positions)
    mapped = jax.vmap(jax.vmap(lambda each: nn.image_patches(each, config)))(images)
    np.testing.assert_array_equal(mapped.pixel_values, together.pixel_values)
    assert together.num_soft_tokens(config.pooling).tolist() == [[4, 4, 4], [4, 4, 4]]


def test_patches_by_hand():
    pixels = np.arange(4 * 6, dtype=np.float32).reshape(4, 6, 1)
    patches = np.asarray(patchify(jnp.asarray(pixels), 2))
    assert patches.tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert patches[3].tolist() == [12, 13, 18, 19]
    positions = nn.patch_positions((1, 2), 1, 3)
    assert positions.tolist() == [[0, 0], [1, 0], [-1, -1]]


def test_pooling_by_position():
    """In any order of patches; what pads them counts nothing."""
    rng = np.random.default_rng(0)
    grid, pooling, budget = (2, 3), 3, 7
    positions = nn.patch_positions(grid, pooling, budget)
    x = rng.normal(size=(len(positions), 5)).astype(np.float32)
    square = x[:54].reshape(2, 3, 3, 3, 5)  # rows of cells, rows, columns of cells, columns
    expected = square.mean(axis=(1, 3)).reshape(6, 5)
    order = rng.permutation(len(positions))
    for chosen in (np.arange(len(positions)), order):
        pooled = pool_by_position(jnp.asarray(x[chosen]), jnp.asarray(positions[chosen]), pooling)
        np.testing.assert_allclose(pooled[:6], expected, atol=1e-6)
        assert pooled.shape == (7, 5) and not np.asarray(pooled[6]).any()
    with pytest.raises(ValueError, match="a multiple of 9, which make a soft token; got 62"):
        pool_by_position(jnp.asarray(x[:62]), jnp.asarray(positions[:62]), pooling)


def test_embeddings_of_positions():
    table = tiny.normal(0, 2, 3, 5)
    positions = tiny.host([[2, 0], [-1, -1], [1, 2], [0, 3]], np.int32)
    embedded = np.asarray(position_embeddings(table, positions))
    wide = np.asarray(table)
    np.testing.assert_array_equal(embedded[0], wide[0, 2] + wide[1, 0])
    assert not embedded[1].any()
    np.testing.assert_array_equal(embedded[2], wide[0, 1] + wide[1, 2])
    # Outside of the table there is no embedding, and nothing plausible in its place.
    assert np.isnan(embedded[3]).all()


@pytest.mark.parametrize(
    "height, width, message",
    [(0, 5, "at least one pixel, got 0 x 5"), (5, 0, "at least one pixel, got 5 x 0")],
)
def test_images_without_pixels(height, width, message):
    with pytest.raises(ValueError, match=message):
        nn.soft_token_grid(height, width, 48, 280)
    with pytest.raises(ValueError, match=message):
        nn.image_patches(jnp.zeros((height, width, 3), jnp.uint8), CONFIG)


def test_budgets():
    assert nn.token_budget(CONFIG) == 5 and nn.token_budget(CONFIG, 13) == 13
    with pytest.raises(ValueError, match=r"must be one of \(5, 13\), .* got 14"):
        nn.token_budget(CONFIG, 14)
    with pytest.raises(ValueError, match="at least one soft token, got 0"):
        nn.soft_token_grid(3, 5, 48, 0)
