"""Strided convolutions that make one vector of four frames of a spectrogram."""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import wide_dtype
from equigemma._typing import Array, Float, PRNGKeyArray
from equigemma.config import ConformerConfig
from equigemma.nn._audio import AudioFeatures
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._init import random_weight
from equigemma.nn._norm import LayerNorm
from equigemma.nn._summary import shallow_repr, summary


class StridedConvolution(eqx.Module):
    """A 3 × 3 convolution with stride 2 over time and frequency, a norm over channels, a ReLU."""

    weight: Float[Array, "outputs inputs 3 3"]
    norm: LayerNorm

    def __init__(
        self, inputs: int, outputs: int, epsilon: float, *, key: PRNGKeyArray, dtype: jnp.dtype
    ):
        self.weight = random_weight(key, (outputs, inputs, 3, 3), (9 * inputs) ** -0.5, dtype)
        self.norm = LayerNorm(outputs, epsilon, use_bias=False, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B time frequency inputs"]
    ) -> Float[Array, "B halved _ outputs"]:
        convolved = jax.lax.conv_general_dilated(
            x,
            self.weight.astype(x.dtype),
            window_strides=(2, 2),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            preferred_element_type=wide_dtype(x),
        )
        return jax.nn.relu(self.norm(convolved.astype(x.dtype)))


class Subsampling(eqx.Module):
    """Two convolutions and a projection: a vector for every four frames, rounded up.

    **Source:** transformers `models/gemma4/modeling_gemma4.py`,
    `Gemma4AudioSubSampleConvProjection`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    convolutions: tuple[StridedConvolution, StridedConvolution]
    projection: AbstractEinsum
    config: ConformerConfig = eqx.field(static=True)

    def __init__(self, config: ConformerConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        first_key, second_key, projection_key = jax.random.split(key, 3)
        first, second = config.channels
        self.convolutions = (
            StridedConvolution(1, first, config.epsilon, key=first_key, dtype=dtype),
            StridedConvolution(first, second, config.epsilon, key=second_key, dtype=dtype),
        )
        frequencies = -(-(-(-config.mel.mels // 2)) // 2)
        shape = (config.width, frequencies * second)
        self.projection = Einsum("...p,Tp->...T", shape, key=projection_key, dtype=dtype)
        self.config = config

    def __call__(self, features: AudioFeatures) -> AudioFeatures:
        """What the conformer reads, and which of its vectors come from real frames."""
        values, is_frame = features.values, features.is_frame
        batch = values.shape[:-2]
        x = values.reshape(-1, *values.shape[-2:], 1)
        mask = is_frame.reshape(-1, is_frame.shape[-1])
        for index, convolve in enumerate(self.convolutions):
            if index == 0 or self.config.subsampling_mask == "every":
                # Padding counts as silence: what is behind the end of a clip changes nothing in it.
                x = jnp.where(mask[..., None, None], x, jnp.zeros((), x.dtype))
            x, mask = convolve(x), mask[:, ::2]
        x = self.projection(x.reshape(*batch, x.shape[1], -1))
        return AudioFeatures(x, mask.reshape(*batch, -1))
