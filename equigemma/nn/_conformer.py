"""The layers of an audio encoder: attention and convolution between two feed-forwards."""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import widened
from equigemma._typing import Array, Bool, Float, PRNGKeyArray
from equigemma.config import ConformerConfig, NormConfig
from equigemma.nn._chunked_attention import ChunkedAttention
from equigemma.nn._clipped import ClippedLinear
from equigemma.nn._init import random_weight
from equigemma.nn._norm import RMSNorm
from equigemma.nn._summary import shallow_repr, summary


def _norm(config: ConformerConfig, dtype: jnp.dtype) -> RMSNorm:
    return RMSNorm(config.width, NormConfig(epsilon=config.epsilon, offset=0.0), dtype=dtype)


def _limited(x: Float[Array, "..."], config: ConformerConfig) -> Float[Array, "..."]:
    """`x` within the bound on activations, and within the range of its dtype."""
    bound = min(config.max_activation, float(jnp.finfo(x.dtype).max))
    return jnp.clip(x, -bound, bound)


class ConformerFeedForward(eqx.Module):
    """`x + scale · post(down(silu(up(pre(x)))))`.

    **Source:** transformers `models/gemma4/modeling_gemma4.py::Gemma4AudioFeedForward`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    pre_norm: RMSNorm
    up: ClippedLinear
    down: ClippedLinear
    post_norm: RMSNorm
    config: ConformerConfig = eqx.field(static=True)

    def __init__(self, config: ConformerConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        up_key, down_key = jax.random.split(key)
        width, hidden, clipping = config.width, config.hidden, config.clipping
        self.pre_norm = _norm(config, dtype)
        self.up = ClippedLinear("...T,FT->...F", (hidden, width), clipping, key=up_key, dtype=dtype)
        self.down = ClippedLinear(
            "...F,TF->...T", (width, hidden), clipping, key=down_key, dtype=dtype
        )
        self.post_norm = _norm(config, dtype)
        self.config = config

    def __call__(self, x: Float[Array, "B L T"]) -> Float[Array, "B L T"]:
        with jax.named_scope("ffw"):
            hidden = jax.nn.silu(self.up(self.pre_norm(_limited(x, self.config))))
            update = self.post_norm(_limited(self.down(hidden), self.config))
            return x + update * self.config.residual_scale


class LightConvolution(eqx.Module):
    """A gated linear unit and a causal convolution of every channel by itself.

    **Source:** transformers `models/gemma4/modeling_gemma4.py::Gemma4AudioLightConv1d`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    pre_norm: RMSNorm
    gate: ClippedLinear
    """Values, then gates."""
    weight: Float[Array, "T kernel"]
    """Taps of each channel, the newest frame last."""
    convolution_norm: RMSNorm
    output: ClippedLinear
    config: ConformerConfig = eqx.field(static=True)

    def __init__(self, config: ConformerConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        gate_key, weight_key, output_key = jax.random.split(key, 3)
        width, clipping = config.width, config.clipping
        self.pre_norm = _norm(config, dtype)
        shape = (2, width, width)
        self.gate = ClippedLinear("...T,COT->...CO", shape, clipping, key=gate_key, dtype=dtype)
        shape = (width, config.kernel)
        self.weight = random_weight(weight_key, shape, config.kernel**-0.5, dtype)
        self.convolution_norm = _norm(config, dtype)
        self.output = ClippedLinear(
            "...T,OT->...O", (width, width), clipping, key=output_key, dtype=dtype
        )
        self.config = config

    def __call__(self, x: Float[Array, "B L T"]) -> Float[Array, "B L T"]:
        with jax.named_scope("convolution"):
            value, gate = jnp.moveaxis(self.gate(self.pre_norm(x)), -2, 0)
            mixed = self._convolved(value * jax.nn.sigmoid(gate))
            hidden = jax.nn.silu(self.convolution_norm(_limited(mixed, self.config)))
            return x + self.output(hidden)

    def _convolved(self, x: Float[Array, "B L T"]) -> Float[Array, "B L T"]:
        # A sum of few products: it fuses into one pass, which a convolution on CPU is far from.
        taps = self.config.kernel
        padded = jnp.pad(widened(x), [(0, 0), (taps - 1, 0), (0, 0)])
        total = jnp.zeros(x.shape, padded.dtype)
        for tap in range(taps):
            weight = self.weight[:, tap].astype(padded.dtype)
            total = total + padded[:, tap : tap + x.shape[1]] * jnp.broadcast_to(weight, x.shape)
        return total.astype(x.dtype)


class ConformerBlock(eqx.Module):
    """Half a feed-forward, attention, a convolution, the other half, and a norm of it all.

    **Source:** Gulati et al. 2020, arXiv:2005.08100; transformers
    `models/gemma4/modeling_gemma4.py::Gemma4AudioLayer`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    first_ffw: ConformerFeedForward
    pre_attention_norm: RMSNorm
    attention: ChunkedAttention
    post_attention_norm: RMSNorm
    convolution: LightConvolution
    second_ffw: ConformerFeedForward
    final_norm: RMSNorm
    config: ConformerConfig = eqx.field(static=True)

    def __init__(self, config: ConformerConfig, *, key: PRNGKeyArray, dtype: jnp.dtype):
        first_key, attention_key, convolution_key, second_key = jax.random.split(key, 4)
        self.first_ffw = ConformerFeedForward(config, key=first_key, dtype=dtype)
        self.pre_attention_norm = _norm(config, dtype)
        self.attention = ChunkedAttention(config, key=attention_key, dtype=dtype)
        self.post_attention_norm = _norm(config, dtype)
        self.convolution = LightConvolution(config, key=convolution_key, dtype=dtype)
        self.second_ffw = ConformerFeedForward(config, key=second_key, dtype=dtype)
        self.final_norm = _norm(config, dtype)
        self.config = config

    def __call__(
        self, x: Float[Array, "B L T"], is_frame: Bool[Array, "B L"]
    ) -> Float[Array, "B L T"]:
        x = self.first_ffw(x)
        normed = self.pre_attention_norm(_limited(x, self.config))
        attended = _limited(self.attention(normed, is_frame), self.config)
        x = x + self.post_attention_norm(attended)
        x = self.second_ffw(self.convolution(x))
        return self.final_norm(_limited(x, self.config))
