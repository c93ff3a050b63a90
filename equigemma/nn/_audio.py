"""Sound as arrays of one shape: clips of different lengths, and what is real of them."""

import equinox as eqx
import jax.numpy as jnp

from equigemma._typing import Array, Bool, Float, Int, typed


class AudioClips(eqx.Module):
    """Mono clips at the sample rate of the model, padded at their ends to one length."""

    samples: Float[Array, "*B samples"]
    """From −1 to 1."""
    lengths: Int[Array, "*B"]
    """Samples of each clip."""

    @property
    def is_sample(self) -> Bool[Array, "*B samples"]:
        """False for padding."""
        steps = jnp.arange(self.samples.shape[-1], dtype=self.lengths.dtype)
        return jnp.broadcast_to(steps, self.samples.shape) < self.lengths[..., None]


class AudioFeatures(eqx.Module):
    """Input of an audio encoder: a feature vector per frame, and a mask of the frames that are not
    padding.

    transformers calls the two `input_features` and `input_features_mask`.
    """

    values: Float[Array, "*B frames features"]
    is_frame: Bool[Array, "*B frames"]


@typed
def audio_frames(clips: AudioClips, frame: int) -> AudioFeatures:
    """Raw samples, `frame` of them in a vector; the last vector of a clip ends with zeros.

    **Arguments:**

    - `clips`: mono samples and their lengths.
    - `frame`: samples of each vector.

    **Returns:** vectors `[*B frames frame]`, and which of them hold samples.

    **Source:** transformers `models/gemma4_unified/feature_extraction_gemma4_unified.py`.
    """
    samples = jnp.where(clips.is_sample, clips.samples, jnp.zeros((), clips.samples.dtype))
    count = -(-samples.shape[-1] // frame)
    missing = count * frame - samples.shape[-1]
    padded = jnp.pad(samples, [(0, 0)] * (samples.ndim - 1) + [(0, missing)])
    starts = jnp.arange(count, dtype=clips.lengths.dtype) * frame
    starts = jnp.broadcast_to(starts, (*clips.lengths.shape, count))
    values = padded.reshape(*samples.shape[:-1], count, frame)
    return AudioFeatures(values, starts < clips.lengths[..., None])
