"""Direct preference optimization (DPO) from pairs of a chosen and a rejected answer."""

from collections.abc import Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._arguments import as_integer, described
from equigemma._typing import Array, Float32
from equigemma.nn import Transformer
from equigemma.train._batch import Batch, Example, as_length, as_rows, collate, each_example
from equigemma.train._checks import check_fields, in_range
from equigemma.train._cross_entropy import cross_entropy_sum, log_probabilities
from equigemma.train._next_token import hidden_states, loss_weights
from equigemma.train._remat import Policy


class PreferenceBatch(eqx.Module):
    """Rows of one text each: in `chosen` the better answer to a prompt, in `rejected` the other.

    `reference_logprobs` is log p of the trained tokens of both by the reference model, see
    `with_reference_logprobs`; zeros stand for a model that finds all texts equally likely.
    """

    chosen: Batch
    rejected: Batch
    reference_logprobs: Float32[Array, "B 2"]


def collate_pairs(
    pairs: Iterable[tuple[Example, Example]], *, length: int, rows: int
) -> Iterator[PreferenceBatch]:
    """Batches of `rows` pairs in their order, better answers first; the last may have empty rows.

    **Arguments:**

    - `pairs`: of examples: the chosen answer and the rejected one, each with its prompt.
    - `length`: tokens of each row.
    - `rows`: pairs of each batch.

    **Returns:** an iterator over batches without a reference; see `with_reference_logprobs`.

    **Raises:** `ValueError` if an example is longer than `length`: half of an answer would be
    judged as a whole one.
    """
    length, rows = as_length(length), as_rows(rows)
    return _pairs(pairs, length, rows)


def _pairs(
    pairs: Iterable[tuple[Example, Example]], length: int, rows: int
) -> Iterator[PreferenceBatch]:
    waiting: list[tuple[Example, Example]] = []
    for number, both in enumerate(pairs):
        if not (isinstance(both, tuple | list) and len(both) == 2):
            raise TypeError(
                f"`pairs` must be pairs of train.Example, the better answer first; number {number} "
                f"is {described(both)}."
            )
        for example in each_example(both):
            if len(example.tokens) > length:
                raise ValueError(
                    f"Pair {number} has an answer that ends after {len(example.tokens)} tokens; "
                    f"rows have {length}. Leave it out, or give a larger length."
                )
        waiting.append(both)
        if len(waiting) == rows:
            yield _collate(waiting, length, rows)
            waiting = []
    if waiting:
        yield _collate(waiting, length, rows)


def _collate(pairs: list[tuple[Example, Example]], length: int, rows: int) -> PreferenceBatch:
    chosen, rejected = (collate([[both[side]] for both in pairs], length, rows) for side in (0, 1))
    return PreferenceBatch(chosen, rejected, jnp.zeros((rows, 2), jnp.float32))


def with_reference_logprobs(
    model: Transformer,
    pairs: PreferenceBatch,
    *,
    compute_dtype: jnp.dtype | type | str | None = None,
    chunk: int = 256,
) -> PreferenceBatch:
    """The pairs with `model` as their reference. Done once for each batch, before tuning.

    **Arguments:**

    - `model`: the reference, usually the model before tuning.
    - `pairs`: as from `collate_pairs`.
    - `compute_dtype`, `chunk`: those of `next_token_loss`.

    **Returns:** the batch, with `reference_logprobs`.
    """
    both = _both(pairs)
    hidden, table = hidden_states(model, both, compute_dtype, None)
    log_p = _of_rows(model, hidden, table, both, chunk)
    return eqx.tree_at(
        lambda p: p.reference_logprobs, pairs, jnp.stack(jnp.split(log_p, 2), axis=-1)
    )


def reward_margins(
    model: Transformer,
    pairs: PreferenceBatch,
    *,
    length_normalized: bool = False,
    compute_dtype: jnp.dtype | type | str | None = None,
    chunk: int = 256,
) -> Float32[Array, " B"]:
    """Implicit reward margins: log-ratio of chosen minus that of rejected, the argument of the
    loss.

    The fraction of pairs with a margin above 0 is the reward accuracy.

    **Arguments:** those of `dpo_loss`.

    **Returns:** margins in nats, without the factor β; with `length_normalized` in nats per token.
    """
    both = _both(pairs)
    hidden, table = hidden_states(model, both, compute_dtype, None)
    log_p = _of_rows(model, hidden, table, both, chunk)
    return _margins(log_p, pairs, both, length_normalized)


def dpo_loss(
    model: Transformer,
    pairs: PreferenceBatch,
    *,
    beta: float = 0.1,
    length_normalized: bool = False,
    label_smoothing: float = 0.0,
    compute_dtype: jnp.dtype | type | str | None = None,
    remat: Policy | None = None,
    chunk: int = 256,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sum of −log σ(β · margin) over the pairs, and their number: a loss for `make_step`.

    The margin is log p(chosen) − log p(rejected), less the same by the reference; p is of all
    trained tokens of an answer.

    **Arguments:**

    - `model`: the model that is tuned.
    - `pairs`: as from `with_reference_logprobs`; without a reference its log-probabilities count as
      0.
    - `beta`: the larger, the closer the model stays to the reference.
    - `length_normalized`: log p is divided by the number of trained tokens, so that long answers do
      not count more than short ones. β is then larger, such as 5.
    - `label_smoothing`: fraction of the pairs whose labels are taken to be swapped.
    - `compute_dtype`, `remat`, `chunk`: those of `next_token_loss`.

    **Returns:** the sum in nats, and the number of pairs; their ratio is the mean loss.

    **Source:** Rafailov et al. 2023, arXiv:2305.18290, equation 7; for lengths Lambert et al. 2024,
    arXiv:2411.15124, section 5; for wrong pairs Mitchell 2023, "A note on DPO with noisy
    preferences".
    """
    beta = in_range("beta", beta, 0)
    label_smoothing = in_range("label_smoothing", label_smoothing, 0, 1)
    chunk = as_integer("chunk", chunk, least=1)
    both = _both(pairs)
    hidden, table = hidden_states(model, both, compute_dtype, remat)
    log_p = _of_rows(model, hidden, table, both, chunk)
    margin = _margins(log_p, pairs, both, length_normalized)
    counts = jnp.all(both.weights.sum(-1).reshape(2, -1) > 0, axis=0).astype(jnp.float32)

    def dpo_sum(margin: Float32[Array, " B"]) -> Float32[Array, ""]:
        right, wrong = jax.nn.log_sigmoid(beta * margin), jax.nn.log_sigmoid(-beta * margin)
        return -jnp.sum(counts * ((1 - label_smoothing) * right + label_smoothing * wrong))

    # What a row's log p weighs is known only after that of its counterpart. So values come first,
    # without gradients; then each row's cross-entropy, so weighted, has the gradient of the whole.
    total, grad = jax.value_and_grad(dpo_sum)(jax.lax.stop_gradient(margin))
    shares = _shares(both, length_normalized)
    weights = both.weights * (jnp.concatenate([-grad, grad]) * shares)[:, None]
    surrogate = cross_entropy_sum(
        hidden,
        table,
        both.targets,
        jax.lax.stop_gradient(weights),
        softcap=model.config.final_softcap,
        chunk=chunk,
    )
    return total + surrogate - jax.lax.stop_gradient(surrogate), counts.sum()


def _both(pairs: PreferenceBatch) -> Batch:
    """All rows in one batch, the better answers first."""
    check_fields(
        "pairs",
        pairs,
        "train.PreferenceBatch, as from train.collate_pairs",
        PreferenceBatch.__dataclass_fields__,
    )
    both = jax.tree.map(lambda *rows: jnp.concatenate(rows), pairs.chosen, pairs.rejected)
    return eqx.tree_at(lambda batch: batch.weights, both, loss_weights(both))


def _of_rows(
    model: Transformer, hidden: Array, table: Any, batch: Batch, chunk: int
) -> Float32[Array, " B"]:
    log_p = log_probabilities(
        hidden, table, batch.targets, softcap=model.config.final_softcap, chunk=chunk
    )
    return jnp.sum(log_p * batch.weights, axis=-1)


def _margins(
    log_p: Float32[Array, " B"], pairs: PreferenceBatch, both: Batch, length_normalized: bool
) -> Float32[Array, " B"]:
    gains = (log_p - pairs.reference_logprobs.T.reshape(-1)) * _shares(both, length_normalized)
    chosen, rejected = jnp.split(gains, 2)
    return chosen - rejected


def _shares(batch: Batch, length_normalized: bool) -> Float32[Array, " B"]:
    counts = batch.weights.sum(axis=-1)
    return 1 / jnp.maximum(counts, 1.0) if length_normalized else jnp.ones_like(counts)
