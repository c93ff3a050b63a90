"""Cross-entropy over a large vocabulary, a chunk of tokens at a time.

With 262,144 words the logits of 8,192 tokens take 8.6 GB, and their gradient as much again. Here
neither ever exists as a whole: each chunk's logits are turned into its loss and its gradients at
once, in the forward pass, and the backward pass only scales them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from equigemma._kernels import barrier_on_cpu, linear_map, summed_products, tangent_or_none
from equigemma._typing import Array, Float, Float32, Int, typed
from equigemma.nn import AbstractEmbedding


@typed
def cross_entropy_sum(
    hidden: Float[Array, "*B L D"],
    table: Float[Array, "V D"] | AbstractEmbedding,
    targets: Int[Array, "*B L"],
    weights: Float32[Array, "*B L"],
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 256,
) -> Float32[Array, ""]:
    """The weighted sum over all tokens of −log p(target), p = softmax(softcap(hidden · tableᵀ)).

    Logits, losses and sums are float32; products run in the dtype of `hidden` and accumulate in
    float32. Gradients reach `hidden` and `table`; that of a `table` that is not differentiated is
    not computed. Divide by `weights.sum()` for a mean.

    **Arguments:**

    - `hidden`: final hidden states, as in `Output.hidden_states`.
    - `table`: or the embedding that has it, such as `model.output_embedding`. One of 8 bits stays
      as it is, and is made floats a block of words at a time; adapters of one learn.
    - `targets`: one that is not in [0, V) makes the result NaN.
    - `weights`: 0 leaves a token out; its target may then be anything, such as −100.
    - `softcap`: logits become c·tanh(logits / c), as with `config.final_softcap`.
    - `label_smoothing`: this share of the target is spread evenly over the vocabulary.
    - `z_loss`: times (log Σ exp logits)², which keeps logits from drifting.
    - `chunk`: tokens whose logits exist at once: memory is `4 · chunk · V` bytes, and little more.
      The gradient of the table is read and written once for each chunk.

    **Returns:** a sum, in nats.

    **Raises:** `ValueError` if `chunk` is below 1, or for the gradient of an embedding that is not
    a plain table.

    **Source:** Wijmans et al. 2024, arXiv:2411.09009 (never store all logits); Chowdhery et al.
    2022, arXiv:2204.02311, section 5 (z-loss).
    """
    options = _Options(softcap, label_smoothing, z_loss)
    hiddens, tables = _terms(hidden, table)
    hidden_chunks = tuple(_chunks(x, targets, chunk) for x in hiddens)
    targets = _ids(jnp.where(weights == 0, 0, targets), tables)
    targets, weights = (_chunks(x, targets, chunk) for x in (targets, weights))
    return _chunked(options, hidden_chunks, tables, targets, weights)


@typed
def log_probabilities(
    hidden: Float[Array, "*B L D"],
    table: Float[Array, "V D"] | AbstractEmbedding,
    targets: Int[Array, "*B L"],
    *,
    softcap: float | None = None,
    chunk: int = 256,
) -> Float32[Array, "*B L"]:
    """log p(target) of every token, for its value only: no gradient passes.

    Gradients come from `cross_entropy_sum`.

    **Arguments:** those of `cross_entropy_sum`.

    **Returns:** log-probabilities, in nats; NaN for a target that is not in [0, V).
    """
    hidden, table = jax.lax.stop_gradient((hidden, table))
    options = _Options(softcap, 0.0, 0.0)

    hiddens, tables = _terms(hidden, table)

    def one(chunk: tuple[tuple[Array, ...], Array]) -> Array:
        hidden_chunks, targets = chunk
        logits = _capped(options, _raw_logits(hidden_chunks, tables))
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)
        return (chosen - _log_of_sum(logits))[:, 0]

    targets = _ids(targets, tables)
    hidden_chunks = tuple(_chunks(x, targets, chunk) for x in hiddens)
    chunks = hidden_chunks, _chunks(targets, targets, chunk)
    return jax.lax.map(one, chunks).reshape(-1)[: targets.size].reshape(targets.shape)


def _terms(hidden: Array, table: Array | AbstractEmbedding) -> tuple[tuple[Array, ...], tuple]:
    """Activations and tables whose products add up to the logits."""
    pairs = table.terms(hidden) if isinstance(table, AbstractEmbedding) else ((hidden, table),)
    hiddens, tables = zip(*pairs, strict=True)
    return hiddens, tables


def _chunks(x: Array, tokens: Array, chunk: int) -> Array:
    """`x`, whose first axes are those of `tokens`, as chunks of tokens; the last one is padded."""
    if chunk < 1:
        raise ValueError(f"A chunk needs at least one token, got chunk={chunk}.")
    rows, width = tokens.size, x.shape[tokens.ndim :]
    chunk = min(chunk, max(rows, 1))
    flat = x.reshape(rows, *width)
    padded = jnp.pad(flat, ((0, -rows % chunk), *((0, 0) for _ in width)))
    return padded.reshape(-1, chunk, *width)


class _Options(NamedTuple):
    softcap: float | None
    label_smoothing: float
    z_loss: float


LARGEST_BLOCK = 16_384
"""Vocabulary entries whose rows are converted, and whose gradients exist, at once."""


def _block(vocab: int) -> int:
    """How many words to take at once: a divisor, so that no block is cut off."""
    divisors = (size for size in range(min(LARGEST_BLOCK, vocab), LARGEST_BLOCK // 16, -1))
    return next((size for size in divisors if vocab % size == 0), vocab)


def _words(tables: tuple) -> int:
    return jax.tree.leaves(tables)[0].shape[0]


def _ids(targets: Array, tables: tuple) -> Array:
    """Targets of which those below 0 are beyond the vocabulary, where JAX reads NaN, and not from
    its end."""
    targets = targets.astype(jnp.int32)
    return jnp.where(targets < 0, _words(tables), targets)


def _over_blocks(
    tables: tuple, body: Callable[[Array, tuple[Array, ...], Any], Any], carry: Any
) -> Any:
    """`carry = body(start, rows of each table, carry)` for each block of words in turn."""
    size = _block(_words(tables))

    def step(index: Array, carry: Any) -> Any:
        start = index * size
        # Every array of an embedding has the words as its first axis.
        parts = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tables)
        rows = (part.table if isinstance(part, AbstractEmbedding) else part for part in parts)
        return body(start, tuple(rows), carry)

    return jax.lax.fori_loop(0, _words(tables) // size, step, carry)


def _raw_logits(hidden_chunks: tuple[Array, ...], tables: tuple) -> Array:
    """Products of the tokens of a chunk with all words, in float32, `[c, V]`.

    A table is converted block by block: a converted copy of it would take as much memory as half
    of its gradient.
    """

    def body(start: Array, rows: tuple[Array, ...], logits: Array) -> Array:
        first, *others = (
            jnp.einsum("cD,VD->cV", x, part.astype(x.dtype), preferred_element_type=jnp.float32)
            for x, part in zip(hidden_chunks, rows, strict=True)
        )
        new = sum(others, start=first)
        return jax.lax.dynamic_update_slice_in_dim(logits, new, start, axis=1)

    blank = jnp.zeros((len(hidden_chunks[0]), _words(tables)), jnp.float32)
    return _over_blocks(tables, body, blank)


def _capped(options: _Options, raw: Array) -> Array:
    softcap = options.softcap
    return raw if softcap is None else softcap * jnp.tanh(raw / softcap)


def _log_of_sum(logits: Array) -> Array:
    """The logarithm of each token's sum of exponentials, `[c, 1]`."""
    top, words = logits.max(axis=-1, keepdims=True), logits.shape[-1]
    size = _block(words)

    def add(index: Array, total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(logits, index * size, size, axis=-1)
        # Within a sum, they would be computed one after the other on CPU, in five times the time.
        exponentials = barrier_on_cpu(jnp.exp(part - top))
        return total + exponentials.sum(axis=-1, keepdims=True)

    return top + jnp.log(jax.lax.fori_loop(0, words // size, add, jnp.zeros_like(top)))


def _loss(options: _Options, raw: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    """The loss of a chunk, and the logarithm of each token's sum of exponentials, `[c, 1]`."""
    logits = _capped(options, raw)
    log_z = _log_of_sum(logits)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    loss = log_z - (1 - options.label_smoothing) * chosen
    if options.label_smoothing:
        loss = loss - options.label_smoothing * logits.mean(axis=-1, keepdims=True)
    if options.z_loss:
        loss = loss + options.z_loss * jnp.square(log_z)
    return jnp.sum(loss[:, 0] * weights), log_z


def _logits_grad(
    options: _Options, raw: Array, log_z: Array, is_target: Array, weights: Array, vocab: int
) -> Array:
    """The derivative of the loss with respect to the raw logits of some words."""
    softcap, label_smoothing, z_loss = options
    logits = _capped(options, raw)
    logits_grad = jnp.exp(logits - log_z) * (1 + 2 * z_loss * log_z)
    logits_grad = (
        logits_grad - jnp.where(is_target, 1 - label_smoothing, 0.0) - label_smoothing / vocab
    )
    if softcap is not None:
        logits_grad = logits_grad * (1 - jnp.square(logits / softcap))
    return logits_grad * weights[:, None]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _chunked(
    options: _Options, xs: tuple[Array, ...], tables: tuple, targets: Array, weights: Array
):
    def add(total: Array, chunk: tuple):
        hidden_chunks, targets, weights = chunk
        loss, _ = _loss(options, _raw_logits(hidden_chunks, tables), targets, weights)
        return total + loss, None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (xs, targets, weights))[0]


@partial(_chunked.defjvp, symbolic_zeros=True)
def _derivative(options: _Options, primals: tuple, tangents: tuple):
    dxs, d_tables = jax.tree.map(tangent_or_none, tangents[:2])
    learns = [bool(jax.tree.leaves(d_table)) for d_table in d_tables]
    for table, does in zip(primals[1], learns, strict=True):
        if does and isinstance(table, AbstractEmbedding):
            raise ValueError(
                f"A {type(table).__name__} cannot learn: leave it out of what is trained, for "
                f"example with `lora.trainable`."
            )
    total, (x_grads, table_grads) = _forward(options, learns, *primals)
    moved = dxs, tuple(d if does else None for d, does in zip(d_tables, learns, strict=True))
    grads = (
        tuple(None if dx is None else grad for dx, grad in zip(dxs, x_grads, strict=True)),
        table_grads,
    )
    dtypes = tuple(table.dtype for table in primals[1])
    return total, linear_map(_along, partial(_backward, dtypes), grads, moved, like=total)


def _forward(
    options: _Options,
    learns: list[bool],
    xs: tuple[Array, ...],
    tables: tuple,
    targets: Array,
    weights: Array,
):
    """The loss, and its derivatives with respect to the activations and the tables that learn."""

    def add(carry: tuple, chunk: tuple):
        total, table_grads = carry
        hidden_chunks, targets, weights = chunk
        raw = _raw_logits(hidden_chunks, tables)
        loss, log_z = _loss(options, raw, targets, weights)

        def of_block(start: Array, rows: tuple[Array, ...], carry: tuple):
            size = len(rows[0])
            words = start + jnp.arange(size, dtype=targets.dtype)
            part = jax.lax.dynamic_slice_in_dim(raw, start, size, axis=1)
            logits_grad = _logits_grad(
                options, part, log_z, targets[:, None] == words[None], weights, _words(tables)
            ).astype(hidden_chunks[0].dtype)
            hidden_grads, table_grads = carry
            add_hidden = partial(_add_hidden_grad, logits_grad)
            add_table = partial(_add_table_grad, logits_grad, start)
            return (
                tuple(map(add_hidden, hidden_grads, hidden_chunks, rows)),
                tuple(map(add_table, table_grads, hidden_chunks)),
            )

        blanks = tuple(jnp.zeros(hidden.shape, jnp.float32) for hidden in hidden_chunks)
        hidden_grads, table_grads = _over_blocks(tables, of_block, (blanks, table_grads))
        return (total + loss, table_grads), tuple(
            grad.astype(hidden.dtype)
            for grad, hidden in zip(hidden_grads, hidden_chunks, strict=True)
        )

    blanks = tuple(
        jnp.zeros(table.shape, jnp.float32) if does else None
        for table, does in zip(tables, learns, strict=True)
    )
    (total, table_grads), x_grads = jax.lax.scan(
        add, (jnp.zeros((), jnp.float32), blanks), (xs, targets, weights)
    )
    return total, (x_grads, table_grads)


def _add_hidden_grad(logits_grad: Array, total: Array, hidden: Array, rows: Array) -> Array:
    """`total` plus the gradient of the activations from some vocabulary entries."""
    return total + jnp.einsum(
        "cV,VD->cD", logits_grad, rows.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def _add_table_grad(
    logits_grad: Array, start: Array, total: Array | None, hidden: Array
) -> Array | None:
    """`total` plus the gradient of some of its rows; None for a table that is not trained."""
    if total is None:
        return None
    new = summed_products(logits_grad, hidden)
    old = jax.lax.dynamic_slice_in_dim(total, start, logits_grad.shape[-1])
    return jax.lax.dynamic_update_slice_in_dim(total, old + new, start, 0)


def _along(grads: Any, tangents: tuple) -> Float32[Array, ""]:
    """The derivative along a direction."""

    def inner(grad: Array, tangent: Array) -> Array:
        return jnp.sum(grad.astype(jnp.float32) * tangent.astype(jnp.float32))

    products = jax.tree.leaves(jax.tree.map(inner, grads, tangents))
    return sum(products, start=jnp.zeros((), jnp.float32))


def _backward(dtypes: tuple[jnp.dtype, ...], grads: Any, cotangent: Array):
    x_grads, table_grads = grads
    return (
        tuple(None if grad is None else grad * cotangent.astype(grad.dtype) for grad in x_grads),
        tuple(
            None if grad is None else (grad * cotangent).astype(dtype)
            for grad, dtype in zip(table_grads, dtypes, strict=True)
        ),
    )
