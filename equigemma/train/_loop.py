"""The training loop: steps, checkpoints, resume, evaluation. No trainer class."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp

from equigemma._arguments import as_integer, described
from equigemma._typing import PRNGKeyArray
from equigemma.train._batch import Batch, ImageBatch
from equigemma.train._batches import DataState
from equigemma.train._checkpoints import Checkpoints
from equigemma.train._checks import check_function, check_loss
from equigemma.train._objective import Loss, sums_of
from equigemma.train._step import Metrics, State, check_usable


class Report(NamedTuple):
    """Report of `fit` after a step. `state` may be used until the next step begins."""

    step: int
    loss: float
    weight: float
    gradient_norm: float
    data_state: DataState
    state: State


class Fitted(NamedTuple):
    """Result of `fit`: after all steps, or after the one during which a signal came."""

    state: State
    data_state: DataState
    signal: signal.Signals | None


class NonFiniteLossError(ValueError):
    """A loss, a gradient or an updated weight was infinite or not a number."""


def fit(
    step: Callable[[State, Any], tuple[State, Metrics]],
    state: State,
    batches: Iterable[tuple[Batch | ImageBatch, DataState]],
    *,
    steps: int,
    checkpoints: Checkpoints | None = None,
    save_every: int = 100,
    data_state: DataState = DataState(),
    key: PRNGKeyArray | None = None,
    report: Callable[[Report], None] = lambda report: None,
) -> Fitted:
    """Takes steps until `state.step` is `steps`, or the batches end.

    ```python
    saved = checkpoints.restore(state) or train.Saved(state, train.DataState(), None)
    batches = train.batches(examples, length=512, rows=4, start=saved.data_state)
    fitted = train.fit(step, saved.state, batches, steps=1000, checkpoints=checkpoints)
    ```

    A run that is killed and begun again in this way computes what it would have computed, bit for
    bit. SIGTERM and SIGINT end it after the step under way, with its state saved.

    **Arguments:**

    - `step`: as from `make_step`.
    - `state`: as from `init`, or restored. It is used up.
    - `batches`: as from `batches`; the next one is made while the device computes.
    - `steps`: the number of steps at which training ends, those before a restart included.
    - `checkpoints`: where states are saved; None: nowhere.
    - `save_every`: a checkpoint is begun whenever the number of steps is a multiple of this. One is
      also made at the end, be it the last step, a signal, or a loss that is not finite.
    - `data_state`: where the batches start, `key`: what a loss draws from; both are saved with the
      state.
    - `report`: called after each step.

    **Returns:** the last state, the data state after its batch, and the signal that ended training,
    if one did.

    **Raises:** `NonFiniteLossError` if a loss, a gradient or new weights are not finite: the last
    good state is saved, with the data state of the batch that led to it; `OSError` if a checkpoint
    cannot be written; `ValueError` if `save_every` is below 1; `TypeError` for arguments of another
    type.
    """
    check_function("step", step, "a state and a batch, as from train.make_step")
    check_function("report", report, "a Report")
    check_usable(state)
    steps, save_every = as_integer("steps", steps, least=0), as_integer("save_every", save_every)
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1 step, got {save_every}.")
    if checkpoints is not None and not isinstance(checkpoints, Checkpoints):
        raise TypeError(
            f"`checkpoints` must be train.Checkpoints(folder), got {described(checkpoints)}."
        )
    if not isinstance(data_state, DataState):
        raise TypeError(f"`data_state` must be a train.DataState, got {described(data_state)}.")
    pairs = _with_states(batches)
    count, stopped = int(state.step), None

    def save() -> None:
        if checkpoints is not None:
            checkpoints.save(state, data_state, key)

    with _signals() as received:
        upcoming = next(pairs, None) if count < steps else None
        while upcoming is not None:
            batch, after = upcoming
            state, metrics = step(state, batch)
            upcoming = next(pairs, None) if count + 1 < steps else None
            if not metrics.finite:
                # The step has changed nothing but its number.
                state = eqx.tree_at(lambda s: s.step, state, jnp.asarray(count, jnp.int32))
                save()
                if checkpoints is not None:
                    checkpoints.wait()
                raise NonFiniteLossError(_explanation(count, metrics))
            count, data_state = count + 1, after
            loss, weight, norm = (float(value) for value in metrics[:3])
            report(Report(count, loss, weight, norm, data_state, state))
            if received:
                stopped = received[0]
                break
            if count % save_every == 0:
                save()
        save()
        if checkpoints is not None:
            checkpoints.wait()
    return Fitted(state, data_state, stopped)


def make_evaluate(loss: Loss) -> Callable[[Any, Iterator[Batch | ImageBatch]], float]:
    """A compiled `evaluate(model, batches) -> mean loss over all targets of all batches`.

    The result raises `ValueError` for no batches, batches without targets, or a loss that does not
    return two scalars.

    **Arguments:** `loss`: `loss(model, batch)`, as `next_token_loss`: a sum, and what to divide it
    by.

    **Returns:** `evaluate`. Its result is in the unit of `loss`, such as nats per target.
    """
    check_loss(loss)
    compiled = eqx.filter_jit(partial(sums_of, loss))

    def evaluate(model: Any, batches: Iterator[Batch | ImageBatch]) -> float:
        total, weight = 0.0, 0.0
        for batch in _iterator(batches, "batches, as from train.pack"):
            sums = compiled(model, batch)
            total, weight = total + float(sums[0]), weight + float(sums[1])
        if not weight:
            raise ValueError("There is nothing to evaluate: the batches have no weighted target.")
        return total / weight

    return evaluate


def _iterator(batches: Any, wanted: str) -> Iterator[Any]:
    # A batch is no list of batches, nor is a text.
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        raise TypeError(f"`batches` must give {wanted}; got {described(batches)}.")
    return iter(batches)


def _with_states(batches: Any) -> Iterator[tuple[Any, DataState]]:
    wanted = "pairs of a batch and its train.DataState, as from train.batches"
    given = _iterator(batches, wanted)

    def checked() -> Iterator[tuple[Any, DataState]]:
        for pair in given:
            is_pair = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], DataState)
            if not is_pair:
                raise TypeError(
                    f"`batches` must give {wanted}; got {described(pair)}. Where there is no state "
                    "to resume from, give (batch, train.DataState())."
                )
            yield pair

    return checked()


def _explanation(count: int, metrics: Metrics) -> str:
    if not jnp.isfinite(metrics.loss):
        what = f"the loss is {float(metrics.loss)}"
    elif not jnp.isfinite(metrics.gradient_norm):
        what = f"the gradient's norm is {float(metrics.gradient_norm)}"
    else:
        what = "the updated weights are not finite, though loss and gradient are"
    return (
        f"Step {count + 1}: {what}. The state before it is kept. A lower learning rate, a longer "
        f"warm-up or float32 may help; or a broken example in the data."
    )


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects requests to stop; the second one of a kind does what it always does."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(number: int, frame: Any) -> None:
        del frame
        received.append(signal.Signals(number))
        signal.signal(number, before[signal.Signals(number)])

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
