"""The gated feed-forward layer."""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import geglu, widened
from equigemma._typing import Array, Float, PRNGKeyArray, typed
from equigemma.config import FeedForwardConfig
from equigemma.nn._einsum import AbstractEinsum, Einsum
from equigemma.nn._summary import shallow_repr, summary


class GatedFeedForward(eqx.Module):
    """`down(gelu(gate(x)) * up(x))`; gate and up projection are one weight.

    **Source:** Shazeer 2020, arXiv:2002.05202; gemma `gm/nn/_modules.py::FeedForward`.
    """

    __pdoc__ = summary
    __repr__ = shallow_repr

    gate: AbstractEinsum
    down: AbstractEinsum
    cutoff: float | None = eqx.field(static=True)

    def __init__(
        self, width: int, config: FeedForwardConfig, *, key: PRNGKeyArray, dtype: jnp.dtype
    ):
        gate_key, down_key = jax.random.split(key)
        sizes = {"C": 2, "F": config.hidden_dim, "D": width}
        self.gate = Einsum(
            f"...D,{config.gate_axes}->...CF",
            tuple(sizes[axis] for axis in config.gate_axes),
            key=gate_key,
            dtype=dtype,
        )
        self.down = Einsum("...F,FD->...D", (config.hidden_dim, width), key=down_key, dtype=dtype)
        self.cutoff = config.cutoff

    @typed
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        with jax.named_scope("ffw"):
            gate_up = self.gate(x)
            if self.cutoff is not None:
                gate, up = jnp.moveaxis(gate_up, -2, 0)
                gate_up = jnp.stack([gaussian_top_k(gate, self.cutoff), up], axis=-2)
            return self.down(geglu(gate_up))


@typed
def gaussian_top_k(x: Float[Array, "*B F"], cutoff: float) -> Float[Array, "*B F"]:
    """Gaussian top-k: each number above mean + cutoff · standard deviation of its row, less that,
    else 0.

    Of normally distributed numbers it keeps a fixed share, and no sorting is needed. Statistics are
    float32 or wider.

    **Source:** gemma `gm/nn/gemma3n/_modules.py::_gaussian_topk`.
    """
    wide = widened(x)
    mean = wide.mean(axis=-1, keepdims=True)
    deviation = wide.std(axis=-1, keepdims=True)
    return jax.nn.relu(wide - (mean + cutoff * deviation)).astype(x.dtype)
