"""The language-modelling loss: cross-entropy of each next token."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from equigemma._arguments import as_float_dtype, described
from equigemma._kernels import on_auto_axes
from equigemma._typing import Array, Bool, Float, Float32
from equigemma.nn import AbstractEmbedding, Embedding, Transformer, activation_dtype
from equigemma.train import _remat
from equigemma.train._batch import Batch, ImageBatch
from equigemma.train._checks import check_fields, check_loss_options, check_model
from equigemma.train._cross_entropy import cross_entropy_sum
from equigemma.train._remat import Policy, check_policy
from equigemma.train._tied import PrecomputedEmbedding, tied_lookup


@on_auto_axes(lambda arguments, sums: PartitionSpec())
def next_token_loss(
    model: Transformer,
    batch: Batch | ImageBatch,
    *,
    soft_tokens: Float[Array, "*B I M D"] | None = None,
    compute_dtype: jnp.dtype | type | str | None = None,
    remat: Policy | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 256,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sum of −log p(next token) over a batch, and the sum of the weights.

    **Arguments:**

    - `model`: any causal `Transformer`, also with adapters, stacked or quantized.
    - `batch`: as from `pack`, `batches` or `collate_images`.
    - `soft_tokens`: the soft tokens of the images of an `ImageBatch`; `image_loss` makes them.
    - `compute_dtype`: of activations and products, by default that of the weights. Each weight is
      converted where it is used; gradients have the weights' own dtype. So float32 weights learn at
      the speed of bfloat16. Activations exceed float16, which is computed in float32.
    - `remat`: the `policy` of `train.remat`; by default every activation is kept for the backward
      pass.
    - `label_smoothing`, `z_loss`, `chunk`: those of `cross_entropy_sum`.

    **Returns:** the sum in nats, and the sum of the weights; their ratio is the mean loss.

    A token or target that is no id of the vocabulary makes the loss NaN under `jit`, and so does a
    weight that is not finite.

    **Raises:** `ValueError` outside of `jit` for such an id or weight, and for arrays of several
    shapes; `TypeError` for what is no model, no batch or no number.
    """
    label_smoothing, z_loss, chunk = check_loss_options(label_smoothing, z_loss, chunk)
    hidden, table = hidden_states(model, batch, compute_dtype, remat, soft_tokens)
    total = cross_entropy_sum(
        hidden,
        table,
        jnp.asarray(batch.targets),
        loss_weights(batch),
        softcap=model.config.final_softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk=chunk,
    )
    return total, loss_weights(batch).sum()


def hidden_states(
    model: Transformer,
    batch: Batch | ImageBatch,
    compute_dtype: jnp.dtype | type | str | None,
    remat: Policy | None,
    soft_tokens: Float[Array, "*B I M D"] | None = None,
) -> tuple[Float[Array, "*B L D"], Float[Array, "V D"] | AbstractEmbedding]:
    """Hidden states before the output projection, and its table."""
    check_model(model)
    _check_arrays(batch)
    if remat is not None:
        check_policy("remat", remat)
    if compute_dtype is None:
        dtype = model.dtype
    else:
        dtype = activation_dtype(as_float_dtype("compute_dtype", compute_dtype))
    # Soft tokens have negative ids, and rows of their own.
    tokens = batch.tokens if soft_tokens is None else jnp.maximum(batch.tokens, 0)
    table = model.output_embedding
    if model.lm_head is None and isinstance(model.embedding, Embedding):
        rows, table = tied_lookup(model.embedding.table, tokens)
        embedding = PrecomputedEmbedding.scaled(rows, dtype)
    elif isinstance(model.embedding, Embedding):
        embedding = PrecomputedEmbedding.scaled(model.embedding.table[tokens], dtype)
    else:
        # As floats, all at once, it would be as large as it ever was.
        embedding = PrecomputedEmbedding(model.embedding.encode(tokens).astype(dtype))
    known = _are_ids(batch, model.config.vocab, soft_tokens is not None)
    embedding = PrecomputedEmbedding(jnp.where(known, embedding.rows, jnp.nan))
    layers = model if remat is None else _remat.remat(model, policy=remat)
    body = eqx.tree_at(lambda m: m.embedding, layers, embedding)
    hidden, _ = body.trunk(
        batch.tokens, soft_tokens=soft_tokens, positions=batch.positions, segments=batch.segments
    )
    return hidden, table


def loss_weights(batch: Batch | ImageBatch) -> Float32[Array, "*B L"]:
    """The weights of a batch as float32: some have a mask there, or integers."""
    return jnp.asarray(batch.weights, jnp.float32)


def _check_arrays(batch: Batch | ImageBatch) -> None:
    names = ("tokens", "targets", "weights", "positions", "segments")
    check_fields("batch", batch, "train.Batch or train.ImageBatch", names)
    arrays = {name: getattr(batch, name) for name in names}
    for name, array in arrays.items():
        if name == "weights" or array is None:
            continue
        is_array = isinstance(array, jax.Array | np.ndarray)
        if not is_array or not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(
                f"`{name}` of a batch must be an array of integers, got {described(array)}."
            )
    finite = jnp.isfinite(loss_weights(batch)).all()
    if not isinstance(finite, Tracer) and not finite:
        raise ValueError("`weights` of a batch must be finite; some are NaN or infinite.")
    shapes = {name: list(jnp.shape(array)) for name, array in arrays.items() if array is not None}
    if any(shape != shapes["tokens"] for shape in shapes.values()):
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"The arrays of a batch are rows of one shape; got {got}.")


def _are_ids(batch: Batch | ImageBatch, vocab: int, has_soft_tokens: bool) -> Bool[Array, ""]:
    """Whether all tokens and targets that count are ids of the vocabulary."""
    tokens, targets = jnp.asarray(batch.tokens), jnp.asarray(batch.targets)
    lowest = jnp.iinfo(tokens.dtype).min if has_soft_tokens else 0
    wrong = ((tokens < lowest) | (tokens >= vocab)) & (batch.positions >= 0)
    wrong_targets = ((targets < 0) | (targets >= vocab)) & (loss_weights(batch) != 0)
    known = ~(wrong.any() | wrong_targets.any())
    if not isinstance(known, Tracer) and not known:
        raise ValueError(
            f"Tokens and targets are ids from 0 to {vocab - 1}, the end of the vocabulary; got "
            f"tokens up to {tokens.max()}, from {tokens.min()}, and targets up to {targets.max()}, "
            f"from {targets.min()}."
        )
    return known
