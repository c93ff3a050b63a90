"""Images, videos and sound as the arrays that encoders read, computed on the host.

Arrays have one of a handful of shapes, whatever the sizes of what they are made from: an image is
padded to its token budget, a clip to the next of a few lengths. So few programs are compiled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from equigemma.audio import Sound, as_mono
from equigemma.config import ConformerConfig, PatchConfig, RawAudioConfig, VisionTransformerConfig
from equigemma.images import Image, as_list, as_rgb
from equigemma.nn import (
    AudioClips,
    ImagePatches,
    num_mel_frames,
    patch_positions,
    soft_token_grid,
    token_budget,
)
from equigemma.video import Video, sample_frames, timestamp


LENGTHS = 5
"""Of clips: the longest, half of it, and so on."""


def preprocess_images(
    images: Image | Sequence[Image],
    config: VisionTransformerConfig | PatchConfig,
    *,
    max_soft_tokens: int | None = None,
) -> ImagePatches:
    """Patches of images of any sizes, each resized by Pillow in its own aspect ratio.

    **Arguments:**

    - `images`: one or several; files, arrays, or images of Pillow's.
    - `config`: that of the vision encoder, `model.config.vision`.
    - `max_soft_tokens`: the token budget of each, by default that of the config.

    **Returns:** patches `[images, patches, pixels]`, padded to the budget, with colours from 0 to
    1, equal to those of transformers' image processor with the `pil` backend.

    **Raises:** `ValueError` for what is not an image, for no images, and for a budget that the
    model was not trained with; `ImportError` if Pillow is not installed.
    """
    budget = token_budget(config, max_soft_tokens)
    patches = [_patches_of(as_rgb(image), config, budget) for image in as_list(images)]
    if not patches:
        raise ValueError("preprocess_images needs at least one image, got none.")
    values, positions = (np.stack(arrays) for arrays in zip(*patches, strict=True))
    return ImagePatches(jnp.asarray(values), jnp.asarray(positions))


def _patches_of(
    rgb: np.ndarray, config: VisionTransformerConfig | PatchConfig, budget: int
) -> tuple[np.ndarray, np.ndarray]:
    height, width, _ = rgb.shape
    grid = soft_token_grid(height, width, config.side, budget)
    resized = _resized(rgb, grid[0] * config.side, grid[1] * config.side)
    patch = config.patch
    rows, columns = (length // patch for length in resized.shape[:2])
    cut = resized.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    values = np.zeros((budget * config.pooling**2, patch**2 * 3), np.float32)
    values[: rows * columns] = cut.reshape(rows * columns, -1)
    values /= np.float32(255)
    return values, patch_positions(grid, config.pooling, budget)


def _resized(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    if rgb.shape[:2] == (height, width):
        return rgb
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Resizing images needs Pillow, which is not installed: "
            'pip install "equigemma[images]". Images of one size can be resized without it, by '
            "nn.image_patches."
        ) from error
    image = Image.fromarray(np.ascontiguousarray(rgb))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


class VideoFrames(NamedTuple):
    """Sampled frames of a video."""

    patches: ImagePatches
    """`[frames, patches, pixels]`."""
    timestamps: tuple[str, ...]
    """Minutes and seconds of each frame, `"00:07"`."""


def preprocess_video(
    video: Video,
    config: VisionTransformerConfig | PatchConfig,
    *,
    max_soft_tokens: int | None = None,
) -> VideoFrames:
    """Evenly spaced frames of a video, each an image with a small token budget.

    **Arguments:**

    - `video`: its frames, and how many of them are a second.
    - `config`: that of the vision encoder, `model.config.vision`.
    - `max_soft_tokens`: the budget of each frame, by default that of the config.

    **Returns:** `config.video_frames` frames, or fewer if the video has fewer, and their times.

    **Raises:** as `preprocess_images`.
    """
    chosen = sample_frames(len(video.frames), config.video_frames)
    budget = config.video_soft_tokens if max_soft_tokens is None else max_soft_tokens
    frames = [video.frames[index] for index in chosen]
    patches = preprocess_images(frames, config, max_soft_tokens=budget)
    return VideoFrames(patches, tuple(timestamp(index / video.fps) for index in chosen))


def preprocess_audio(
    clips: Sound | Sequence[Sound], config: ConformerConfig | RawAudioConfig
) -> AudioClips:
    """Clips of any lengths, rates and numbers of channels, as mono samples padded to one length.

    **Arguments:**

    - `clips`: a list of sounds, or one that is not a list.
    - `config`: that of the audio encoder.

    **Returns:** clips `[clips, samples]`; see `padded_length`.

    **Raises:** `ValueError` for what is not sound, for no clips, and for clips that are too short
    or too long; `ImportError` for files of formats whose library is not installed.
    """
    several = clips if isinstance(clips, list) else [clips]
    if not several:
        raise ValueError("preprocess_audio needs at least one clip, got none.")
    seconds = config.max_samples / config.sample_rate
    samples = [as_mono(clip, config.sample_rate, seconds) for clip in several]
    longest = max(map(len, samples))
    for clip in samples:
        _check_frames(len(clip), config)
    padded = np.zeros((len(samples), padded_length(longest, config)), np.float32)
    for row, clip in zip(padded, samples, strict=True):
        row[: len(clip)] = clip
    lengths = np.asarray([len(clip) for clip in samples], np.int32)
    return AudioClips(jnp.asarray(padded), jnp.asarray(lengths))


def _check_frames(samples: int, config: ConformerConfig | RawAudioConfig) -> None:
    if isinstance(config, ConformerConfig) and not num_mel_frames(samples, config.mel):
        needed = config.mel.frame + 1 - config.mel.padding
        raise ValueError(
            f"A clip needs at least {needed} samples at {config.sample_rate} per second, "
            f"{1000 * needed / config.sample_rate:.3g} ms; got {samples}."
        )


def padded_length(samples: int, config: ConformerConfig | RawAudioConfig) -> int:
    """The samples that a clip is padded to: the longest possible, half of it, a quarter, …

    ```python
    >>> from equigemma.config import ConformerConfig
    >>> from equigemma.preprocessing import padded_length
    >>> padded_length(100_000, ConformerConfig())  # 6.25 seconds become 7.5
    120000

    ```

    **Arguments:**

    - `samples`: of the longest clip, at most `config.max_samples`.
    - `config`: that of the audio encoder.

    **Returns:** a number of samples, at least `samples`.
    """
    longest = config.max_samples
    lengths = (-(-longest // 2**halvings) for halvings in reversed(range(LENGTHS)))
    return next(length for length in lengths if length >= samples)
