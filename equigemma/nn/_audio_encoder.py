"""Sound to soft tokens: by a conformer over a spectrogram, or from raw samples."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Bool, Float, PRNGKeyArray, typed
from equigemma.config import ConformerConfig, NormConfig, RawAudioConfig
from equigemma.nn._audio import AudioClips, AudioFeatures, audio_frames
from equigemma.nn._conformer import ConformerBlock
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._mel import log_mel_spectrogram
from equigemma.nn._norm import RMSNorm
from equigemma.nn._siglip import Affine
from equigemma.nn._subsampling import Subsampling
from equigemma.nn._summary import shallow_repr, summary


class AbstractAudioEncoder(eqx.Module):
    """Clips to soft tokens."""

    @abstractmethod
    def features(self, clips: AudioClips) -> AudioFeatures:
        """What `__call__` reads, as a function of samples that can be differentiated."""

    @abstractmethod
    def __call__(
        self, features: AudioFeatures
    ) -> tuple[Float[Array, "*B M D"], Bool[Array, "*B M"]]:
        """Encodes clips as soft tokens, in the dtype of their features.

        Those of a clip come first; zeros follow.

        **Arguments:** `features`: a feature vector for each frame, and which frames are not
        padding.

        **Returns:** soft tokens, and a mask that is True where they are real.
        """


class AudioEncoder(AbstractAudioEncoder):
    """A log-mel spectrogram through convolutions, a conformer, and a projection.

    **Source:** transformers `models/gemma4/modeling_gemma4.py::Gemma4AudioModel`,
    `Gemma4MultimodalEmbedder`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    subsampling: Subsampling
    layers: tuple[ConformerBlock, ...]
    output: Affine
    norm: RMSNorm
    projection: AbstractEinsum
    config: ConformerConfig = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        config: ConformerConfig,
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype | type = jnp.float32,
    ):
        dtype = jnp.dtype(dtype)
        subsampling_key, output_key, projection_key, *layer_keys = jax.random.split(
            key, 3 + config.layers
        )
        self.subsampling = Subsampling(config, key=subsampling_key, dtype=dtype)
        self.layers = tuple(ConformerBlock(config, key=one, dtype=dtype) for one in layer_keys)
        inner = config.output_width
        self.output = Affine("...T,OT->...O", (inner, config.width), key=output_key, dtype=dtype)
        normed = inner if config.projection_norm == "before" else width
        norm = NormConfig(epsilon=config.epsilon, offset=None)
        self.norm = RMSNorm(normed, norm, dtype=dtype)
        self.projection = Einsum("...O,DO->...D", (width, inner), key=projection_key, dtype=dtype)
        self.config = config

    def features(self, clips: AudioClips) -> AudioFeatures:
        """The log-mel spectrogram.

        **Raises:** `ValueError` for clips that are shorter than a frame.
        """
        return log_mel_spectrogram(clips, self.config.mel)

    @typed
    def __call__(
        self, features: AudioFeatures
    ) -> tuple[Float[Array, "*B M D"], Bool[Array, "*B M"]]:
        with jax.named_scope("audio"):
            batch, shape = features.is_frame.shape[:-1], features.values.shape[-2:]
            flat = AudioFeatures(
                features.values.reshape(-1, *shape), features.is_frame.reshape(-1, shape[0])
            )
            inputs = self.subsampling(flat)
            x, is_token = inputs.values, inputs.is_frame
            for index, layer in enumerate(self.layers):
                with jax.named_scope(f"audio_layer_{index}"):
                    x = layer(x, is_token)
            x = self.output(x)
            if self.config.projection_norm == "before":
                soft = self.projection(self.norm(x))
            else:
                soft = self.norm(self.projection(x))
            soft = jnp.where(is_token[..., None], soft, jnp.zeros((), soft.dtype))
            return soft.reshape(*batch, *soft.shape[1:]), is_token.reshape(*batch, -1)


class FrameEmbedder(AbstractAudioEncoder):
    """Raw samples, normalised and projected: a soft token for each frame.

    **Source:** transformers `models/gemma4_unified/modeling_gemma4_unified.py`,
    `Gemma4UnifiedMultimodalEmbedder`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    norm: RMSNorm
    projection: AbstractEinsum
    config: RawAudioConfig = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        config: RawAudioConfig,
        *,
        key: PRNGKeyArray,
        dtype: jnp.dtype | type = jnp.float32,
    ):
        dtype = jnp.dtype(dtype)
        norm = NormConfig(epsilon=config.epsilon, offset=None)
        self.norm = RMSNorm(config.frame, norm, dtype=dtype)
        self.projection = Einsum("...p,Dp->...D", (width, config.frame), key=key, dtype=dtype)
        self.config = config

    def features(self, clips: AudioClips) -> AudioFeatures:
        """Frames of samples."""
        return audio_frames(clips, self.config.frame)

    @typed
    def __call__(
        self, features: AudioFeatures
    ) -> tuple[Float[Array, "*B M D"], Bool[Array, "*B M"]]:
        with jax.named_scope("audio"):
            soft = self.projection(self.norm(features.values))
            soft = jnp.where(features.is_frame[..., None], soft, jnp.zeros((), soft.dtype))
            return soft, features.is_frame
