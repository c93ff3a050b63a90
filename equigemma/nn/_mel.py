"""The log-mel spectrogram of sound, as a function that can be differentiated."""

import jax
import jax.numpy as jnp
import numpy as np

from equigemma._kernels import widened
from equigemma._typing import Array, Bool, typed
from equigemma.config import MelConfig
from equigemma.nn._audio import AudioClips, AudioFeatures


@typed
def log_mel_spectrogram(clips: AudioClips, config: MelConfig = MelConfig()) -> AudioFeatures:
    """Logarithms of magnitudes, not powers, in bands that are evenly spaced in mels.

    Computed in float32 or wider. Frames that are not real are zero. Where all of a frame is silent
    its derivative is zero.

    **Arguments:**

    - `clips`: mono samples and their lengths.
    - `config`: sizes in samples and bands.

    **Returns:** features `[*B frames bands]`, in float32 or wider, and which frames are real.

    **Raises:** `ValueError` for clips that are shorter than a frame.

    **Source:** transformers `models/gemma4/feature_extraction_gemma4.py`.
    """
    count = num_mel_frames(clips.samples.shape[-1], config)
    if count < 1:
        raise ValueError(
            f"A clip needs at least {config.frame + 1 - config.padding} samples for a frame of the "
            f"spectrogram, got {clips.samples.shape[-1]}."
        )
    with jax.named_scope("log_mel_spectrogram"):
        samples = widened(clips.samples)
        samples = jnp.where(clips.is_sample, samples, jnp.zeros((), samples.dtype))
        padding = [(0, 0)] * (samples.ndim - 1) + [(config.padding, 0)]
        starts = np.arange(count)[:, None] * config.hop
        frames = jnp.pad(samples, padding)[..., starts + np.arange(config.frame)]
        window = jnp.asarray(hann_window(config.frame, config.window_offset), samples.dtype)
        spectrum = jnp.fft.rfft(frames * jnp.broadcast_to(window, frames.shape), config.fft)
        filters = jnp.asarray(mel_filters(config), samples.dtype)
        mel = jnp.einsum("...fb,bm->...fm", jnp.abs(spectrum), filters, precision="highest")
        is_frame = _is_frame(clips, count, config)
        values = jnp.log(mel + config.floor)
        return AudioFeatures(jnp.where(is_frame[..., None], values, 0.0), is_frame)


def num_mel_frames(samples: int, config: MelConfig) -> int:
    """Frames of a clip. One sample behind the last frame is asked for, which nothing reads.

    **Arguments:**

    - `samples`: of the clip.
    - `config`: that of the spectrogram.

    **Returns:** a number of frames; 0 for a clip that is too short.
    """
    return max(0, (samples + config.padding - config.frame - 1) // config.hop + 1)


def _is_frame(clips: AudioClips, count: int, config: MelConfig) -> Bool[Array, "*B frames"]:
    steps = jnp.arange(count, dtype=clips.lengths.dtype)
    steps = jnp.broadcast_to(steps, (*clips.lengths.shape, count))
    lengths = clips.lengths[..., None]
    if config.validity == "complete":
        return steps * config.hop + config.frame - config.padding < lengths
    per_frame = clips.samples.shape[-1] / count
    return steps < jnp.floor(lengths.astype(jnp.float32) / per_frame).astype(steps.dtype)


def hann_window(length: int, offset: float) -> np.ndarray:
    """A periodic Hann window, shifted by `offset` samples; float32, as the references have it."""
    angles = 2 * np.pi * (np.arange(length) + offset) / length
    return (0.5 - 0.5 * np.cos(angles)).astype(np.float32)


def mel_filters(config: MelConfig) -> np.ndarray:
    """Triangles over frequencies, `float64[fft / 2 + 1, mels]`, each of height 1.

    Where mels are narrower than the transform's resolution, a filter may be zero everywhere.

    **Source:** Young et al., The HTK Book, section 5.4.
    """
    highest = config.sample_rate / 2
    frequencies = np.linspace(0, highest, config.fft // 2 + 1)
    mels = np.linspace(0, 2595 * np.log10(1 + highest / 700), config.mels + 2)
    corners = 700 * (10 ** (mels / 2595) - 1)
    widths = np.diff(corners)
    rising = (frequencies[:, None] - corners[:-2]) / widths[:-1]
    falling = (corners[2:] - frequencies[:, None]) / widths[1:]
    return np.maximum(0, np.minimum(rising, falling))
