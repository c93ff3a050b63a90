"""Images, videos and sound of any size as arrays of few shapes, and what is refused."""

import equinox as eqx
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equigemma import nn
from equigemma.config import ConformerConfig, PatchConfig, RawAudioConfig, VisionTransformerConfig
from equigemma.preprocessing import (
    padded_length,
    preprocess_audio,
    preprocess_images,
    preprocess_video,
)
from equigemma.video import Video, sample_frames, timestamp


PIL = pytest.importorskip("PIL.Image", reason="images are resized by Pillow, an extra")

VISION = VisionTransformerConfig(
    width=8, layers=1, heads=1, head_dim=4, hidden=7, patch=2, positions=3360
)
RATE = 16_000


def picture(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


@pytest.mark.slow
def test_a_hundred_sizes_are_one_program():
    """All images with one budget have arrays of one shape; there are five budgets."""
    model = nn.VisionEncoder(5, VISION, key=jax.random.key(0))
    encode = eqx.filter_jit(lambda model, patches: model(patches))
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(500), (100, 2))).astype(int)
    assert len({tuple(size) for size in sizes.tolist()}) > 90
    encode(model, preprocess_images(picture(3, 5), VISION))
    with hlo.compilations() as made:
        counts = set()
        for size in sizes.tolist():
            patches = preprocess_images(picture(*size), VISION)
            counts.add(int((np.asarray(patches.positions)[..., 0] >= 0).sum()))
            encode(model, patches).block_until_ready()
    assert len(counts) > 30 and not made


def test_clips_have_few_lengths():
    config = ConformerConfig()
    lengths = {padded_length(samples, config) for samples in range(161, 480_001, 97)}
    assert sorted(lengths) == [30_000, 60_000, 120_000, 240_000, 480_000]
    assert padded_length(30_000, config) == 30_000 and padded_length(30_001, config) == 60_000
    assert padded_length(480_000, config) == 480_000
    clips = preprocess_audio([np.zeros(400), np.zeros(30_001)], config)
    assert clips.samples.shape == (2, 60_000) and clips.lengths.tolist() == [400, 30_001]


def test_several_images_of_any_kind(tmp_path):
    grey = picture(7, 11)[..., 0]
    path = tmp_path / "a.png"
    PIL.fromarray(picture(5, 9)).save(path)
    given = [picture(40, 30), grey, PIL.fromarray(picture(3, 4)), path, jnp.asarray(picture(6, 6))]
    patches = preprocess_images(given, VISION, max_soft_tokens=70)
    assert patches.pixel_values.shape == (5, 630, 12)
    assert 0 <= np.asarray(patches.pixel_values).min() < np.asarray(patches.pixel_values).max() <= 1
    for index, image in enumerate(given):
        alone = preprocess_images(image, VISION, max_soft_tokens=70)
        np.testing.assert_array_equal(alone.pixel_values[0], patches.pixel_values[index])


@pytest.mark.parametrize("budget", VISION.budgets)
@pytest.mark.parametrize("config", [VISION, PatchConfig(patch=6)], ids=["encoder", "raw"])
def test_budgets_are_honoured(config, budget):
    patches = preprocess_images(picture(300, 400), config, max_soft_tokens=budget)
    (count,) = np.asarray(patches.num_soft_tokens(config.pooling))
    assert 0.8 * budget < count <= budget
    assert patches.positions.shape == (1, budget * config.pooling**2, 2)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1)], ids=str)
def test_extreme_shapes(size):
    patches = preprocess_images(picture(*size), VISION)
    count = int(np.asarray(patches.num_soft_tokens(3))[0])
    assert count == (256 if size == (1, 1) else 280)
    columns, rows = np.asarray(patches.positions)[0].max(axis=0) + 1
    assert columns * rows == 9 * count
    assert (columns > rows) == (size[1] > size[0]) or size == (1, 1)


@pytest.mark.parametrize(
    "given, options, message",
    [
        ([], {}, "needs at least one image, got none"),
        (np.zeros((0, 5, 3), np.uint8), {}, "at least one pixel"),
        (np.zeros((5, 0, 3), np.uint8), {}, "at least one pixel"),
        (np.zeros((5, 4, 3)), {}, "An image must be uint8"),
        (picture(3, 4), dict(max_soft_tokens=281), "must be one of .* got 281"),
        (picture(3, 4), dict(max_soft_tokens=0), "must be one of .* got 0"),
    ],
)
def test_bad_images(given, options, message):
    with pytest.raises(ValueError, match=message):
        preprocess_images(given, VISION, **options)


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match=r'needs Pillow, .* "equigemma\[images\]"'):
        preprocess_images(picture(3, 4), VISION)


def test_videos():
    frames = np.stack([np.full((6, 8, 3), index, np.uint8) for index in range(100)])
    video = preprocess_video(Video(frames, fps=2.0), VISION)
    assert video.patches.pixel_values.shape == (32, 630, 12)
    shades = np.asarray(video.patches.pixel_values)[:, 0, 0] * 255
    assert np.round(shades).astype(int).tolist() == sample_frames(100, 32)
    assert video.timestamps[:3] == ("00:00", "00:01", "00:03")
    assert video.timestamps[-1] == timestamp(96 / 2) == "00:48"
    few = preprocess_video(Video(list(frames[:3]), fps=0.01), VISION, max_soft_tokens=140)
    assert few.timestamps == ("00:00", "01:40", "03:20")
    assert few.patches.pixel_values.shape == (3, 1260, 12)


@pytest.mark.parametrize(
    "frames, fps, message",
    [
        ([], 24, "at least one frame, got none"),
        (np.zeros((0, 3, 3, 3), np.uint8), 24, "at least one frame, got none"),
        ([picture(3, 4)], 0, "fps must be positive, got 0"),
        ([picture(3, 4)], float("nan"), "fps must be positive, got nan"),
        ([picture(3, 4)], float("inf"), "fps must be positive, got inf"),
    ],
)
def test_bad_videos(frames, fps, message):
    with pytest.raises(ValueError, match=message):
        Video(frames, fps=fps)


@pytest.mark.parametrize("config", [ConformerConfig(), RawAudioConfig()], ids=["encoder", "raw"])
def test_bad_sound(config):
    for given, message in [
        ([], "needs at least one clip, got none"),
        (np.zeros(0), "has no samples"),
        ([np.zeros(16_000), np.zeros(480_001)], r"is 30.0001 seconds long, .* at most 30 seconds"),
        (np.zeros(31 * RATE), "is 31 seconds long"),
        (np.full(3, np.nan), "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            preprocess_audio(given, config)


def test_clips_that_are_too_short():
    with pytest.raises(
        ValueError, match="at least 161 samples at 16000 per second, 10.1 ms; got 160"
    ):
        preprocess_audio([np.zeros(500), np.zeros(160)], ConformerConfig())
    assert preprocess_audio(np.zeros(1), RawAudioConfig()).lengths.tolist() == [1]


def test_other_rates_and_stereo():
    stereo = np.random.default_rng(0).uniform(-1, 1, (44_100, 2))
    clips = preprocess_audio([(stereo, 44_100), stereo[:500, 0]], ConformerConfig())
    assert clips.lengths.tolist() == [16_000, 500] and clips.samples.shape == (2, 30_000)
    assert not np.asarray(clips.samples)[1, 500:].any()
