"""Log-probabilities of what was generated, kept step by step."""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, Int, typed


class Logprobs(eqx.Module):
    """Natural logarithms of the model's own probabilities, before any transform, per new token.

    After the end of a row, where its token is −1, they are 0: a sum over a row is that of its text.
    """

    chosen: Float[Array, "*B new"]
    top: Float[Array, "*B new top"]  # of the most probable tokens, best first
    top_tokens: Int[Array, "*B new top"]


def init_logprobs(batch: tuple[int, ...], steps: int, top: int) -> Logprobs:
    """Room for `steps` tokens, and the `top` most probable ones at each."""
    return Logprobs(
        jnp.zeros((*batch, steps), jnp.float32),
        jnp.zeros((*batch, steps, top), jnp.float32),
        jnp.full((*batch, steps, top), -1, jnp.int32),
    )


@typed
def append_logprobs(
    before: Logprobs,
    logits: Float[Array, "*B V"],
    token: Int[Array, "*B"],
    step: Int[Array, ""],
) -> Logprobs:
    """Writes down one step; token −1 marks rows that have ended."""
    running = (token >= 0)[..., None]
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, jnp.maximum(token, 0)[..., None], axis=-1)
    top, ids = jax.lax.top_k(logits, before.top.shape[-1])

    def write(buffer: Array, value: Array):
        return jax.lax.dynamic_update_slice_in_dim(buffer, value, step, axis=token.ndim)

    return Logprobs(
        write(before.chosen, jnp.where(running, chosen - total, 0)),
        write(before.top, jnp.where(running, top - total, 0)[..., None, :]),
        write(before.top_tokens, jnp.where(running, ids, -1)[..., None, :]),
    )
