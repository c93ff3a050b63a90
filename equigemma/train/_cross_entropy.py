"""Cross-entropy over a large vocabulary, a chunk of tokens at a time.

With 262,144 words the logits of 8,192 tokens take 8.6 GB, and their gradient as much again. Here
neither ever exists as a whole: each chunk's logits are turned into its loss and its gradients at
once, in the forward pass, and the backward pass only scales them.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, Float32, Int, typed


@typed
def cross_entropy(
    hidden: Float[Array, "*B L D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "*B L"],
    weights: Float32[Array, "*B L"],
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 512,
) -> Float32[Array, ""]:
    """The weighted sum over all tokens of −log p(target), p = softmax(softcap(hidden · tableᵀ)).

    Logits, losses and sums are float32; products run in the dtype of `hidden` and accumulate in
    float32. Gradients reach `hidden` and `table`; that of a `table` that is not differentiated is
    not computed. Divide by `weights.sum()` for a mean.

    **Arguments:**

    - `weights`: 0 leaves a token out; its target may then be anything in [0, V).
    - `label_smoothing`: this share of the target is spread evenly over the vocabulary.
    - `z_loss`: times (log Σ exp logits)², which keeps logits from drifting.
    - `chunk`: tokens whose logits exist at once; memory is `4 · chunk · V` bytes, a few times.

    **Source:** Wijmans et al. 2024, arXiv:2411.09009 (never store all logits); Chowdhery et al.
    2022, arXiv:2204.02311, section 5 (z-loss).
    """
    if chunk < 1:
        raise ValueError(f"A chunk needs at least one token, got chunk={chunk}.")
    rows = targets.size
    chunk = min(chunk, max(rows, 1))
    padding = -rows % chunk

    def chunks(x: Array, width: tuple[int, ...] = ()) -> Array:
        flat = x.reshape(rows, *width)
        padded = jnp.pad(flat, ((0, padding), *((0, 0) for _ in width)))
        return padded.reshape(-1, chunk, *width)

    options = _Options(softcap, label_smoothing, z_loss)
    return _chunked(
        options,
        chunks(hidden, hidden.shape[-1:]),
        table,
        chunks(targets),
        chunks(weights),
    )


class _Options(NamedTuple):
    softcap: float | None
    label_smoothing: float
    z_loss: float


def _losses(options: _Options, x, table, targets, weights):
    """Loss of one chunk, and its derivative with respect to the uncapped logits."""
    softcap, label_smoothing, z_loss = options
    raw = jnp.einsum("cD,VD->cV", x, table, preferred_element_type=jnp.float32)
    logits = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    is_target = jax.nn.one_hot(targets, table.shape[0], dtype=bool)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    loss = log_z - (1 - label_smoothing) * chosen
    if label_smoothing:
        loss = loss - label_smoothing * logits.mean(axis=-1, keepdims=True)
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)

    slope = jnp.exp(logits - log_z) * (1 + 2 * z_loss * log_z)
    slope = (
        slope - jnp.where(is_target, 1 - label_smoothing, 0.0) - label_smoothing / table.shape[0]
    )
    if softcap is not None:
        slope = slope * (1 - jnp.square(logits / softcap))
    return jnp.sum(loss[:, 0] * weights), slope * weights[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(options: _Options, x, table, targets, weights):
    def add(total, chunk):
        piece, targets, weights = chunk
        return total + _losses(options, piece, table, targets, weights)[0], None

    table = table.astype(x.dtype)
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (x, targets, weights))[0]


def _forward(options: _Options, x, table, targets, weights):
    needs_table = table.perturbed
    x, full_table, targets, weights = (argument.value for argument in (x, table, targets, weights))
    table = full_table.astype(x.dtype)

    def add(carry, chunk):
        total, table_slope = carry
        piece, targets, weights = chunk
        loss, slope = _losses(options, piece, table, targets, weights)
        slope = slope.astype(piece.dtype)
        piece_slope = jnp.einsum(
            "cV,VD->cD", slope, table, preferred_element_type=jnp.float32
        ).astype(piece.dtype)
        if needs_table:
            table_slope = table_slope + jnp.einsum(
                "cV,cD->VD", slope, piece, preferred_element_type=jnp.float32
            )
        return (total + loss, table_slope), piece_slope

    blank = jnp.zeros(table.shape, jnp.float32) if needs_table else None
    (total, table_slope), x_slope = jax.lax.scan(
        add, (jnp.zeros((), jnp.float32), blank), (x, targets, weights)
    )
    return total, (x_slope, table_slope, jnp.zeros(0, full_table.dtype))


def _backward(options: _Options, slopes, cotangent):
    x_slope, table_slope, like_table = slopes
    return (
        x_slope * cotangent.astype(x_slope.dtype),
        None if table_slope is None else (table_slope * cotangent).astype(like_table.dtype),
        None,
        None,
    )


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)
