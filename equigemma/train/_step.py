"""One step of training: a loss, its gradient, an optax update. Nothing is hidden or global."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from equigemma._arguments import as_integer, as_number, described
from equigemma._kernels import on_auto_axes, spec_of, sum_of_squares
from equigemma._typing import Array, Bool, Float32, Int
from equigemma.train._checks import check_function, check_loss, check_optimizer
from equigemma.train._compile import compile_ahead_of_time
from equigemma.train._objective import Loss, Objective, mean_of
from equigemma.train._optimizer import apply, check_made_by, extended, init_optimizer


class State(eqx.Module):
    """Everything that training changes, and the part of the model that it does not.

    `model` and `frozen` are halves of one tree, see `equinox.partition`.
    """

    model: Any
    frozen: Any
    optimizer: optax.OptState
    step: Int[Array, ""]  # updates made


class Metrics(NamedTuple):
    """Metrics of one step. A step whose loss, gradient or new weights are not finite changes
    nothing but the count.
    """

    loss: Float32[Array, ""]  # mean over the weighted targets
    weight: Float32[Array, ""]  # their number, if weights are 0 and 1
    gradient_norm: Float32[Array, ""]
    finite: Bool[Array, ""]


def init(
    model: Any, optimizer: optax.GradientTransformation, *, trainable: Any = eqx.is_inexact_array
) -> State:
    """The state before the first step. What is trained is copied: the model stays usable, and costs
    its memory for as long as it is kept.

    **Arguments:**

    - `model`: for `optax.lookahead` a pair, `optax.LookaheadParams.init_synced(model)`.
    - `optimizer`: any transformation of `optax`.
    - `trainable`: which leaves to train, as in `equinox.partition`: a function of a leaf, or a tree
      of booleans.

    **Returns:** a `State` at step 0.

    **Raises:** `ValueError` if no leaf is to be trained, if `trainable` is of another tree, or if
    the optimizer was made for something else: see `param_labels`; `TypeError` for what is no
    optimizer.
    """
    check_optimizer(optimizer)
    if isinstance(model, optax.LookaheadParams):
        halves = [_partition(part, trainable) for part in model]
        trained, frozen = (optax.LookaheadParams(*parts) for parts in zip(*halves, strict=True))
    else:
        trained, frozen = _partition(model, trainable)
    if not jax.tree.leaves(trained):
        raise ValueError("Nothing is to be trained: `trainable` selects no array of the model.")
    if whole := [leaf for leaf in jax.tree.leaves(trained) if not _is_inexact(leaf)]:
        raise ValueError(
            f"`trainable` selects {described(whole[0])}, which has no gradient: choose floats, as "
            "the default, equinox.is_inexact_array, does."
        )
    # Steps take over the buffers of the state. Those that a file was read into are not JAX's own,
    # and would be there beside the new ones.
    trained = jax.tree.map(jnp.copy, trained)
    return State(trained, frozen, init_optimizer(optimizer, trained), jnp.zeros((), jnp.int32))


def _is_inexact(leaf: Any) -> bool:
    # Of an array the dtype is asked for: it may be one that only has a shape yet.
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.inexact)


def _partition(model: Any, trainable: Any) -> tuple[Any, Any]:
    try:
        return eqx.partition(model, trainable)
    except ValueError as error:
        raise ValueError(
            f"`trainable` must be a function of an array, or a tree of True and False of the "
            f"model's own structure, such as lora.trainable(model); got {described(trainable)}."
        ) from error


def merge(state: State) -> Any:
    """The whole model; of `optax.lookahead` the pair of models, of which `slow` is the trained one.

    **Arguments:** `state`: as from `init`, a step or `fit`.

    **Returns:** the model; it shares its arrays with the state, whose next step takes over those
    that are trained.

    **Raises:** `ValueError` for a state that a step has taken over.
    """
    check_usable(state)
    return eqx.combine(state.model, state.frozen)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    max_grad_norm: float | None = None,
    micro_batches: int = 1,
    extra_args: Callable[[Callable[[Any], Array]], Mapping[str, Any]] = lambda mean_loss: {},
) -> Callable[[State, Any], tuple[State, Metrics]]:
    """A compiled `step(state, batch) -> (state, metrics)`.

    The buffers of the old state are taken over by the new one; the frozen part stays usable. A step
    whose loss, gradient or new weights are not finite leaves model and optimizer as they were, and
    `metrics.finite` says so.

    **Arguments:**

    - `loss`: `loss(model, batch)`, as `next_token_loss`: a sum, and what to divide it by.
    - `optimizer`: any transformation of `optax`. Its update gets the extra arguments that it takes
      of `value` (the mean loss), `grad` (its gradient before `max_grad_norm`) and `value_fn` (the
      mean loss of this batch as a function of what is trained), which line searches and
      `reduce_on_plateau` need.
    - `max_grad_norm`: gradients are clipped to this global norm. `optax.clip_by_global_norm` does
      the same with a second copy of the gradient.
    - `micro_batches`: gradient accumulation. The first axis of every array of a batch is cut into
      so many parts, whose gradients are added up before one update. As losses are sums, divided by
      the weight of the whole batch at the end, the result is that of the batch as a whole, however
      its weights are spread.
    - `extra_args`: further extra arguments of the update by name, made from the mean loss, a
      function of what is trained: `lambda mean_loss: {"obj_fn": mean_loss}` for
      `optax.contrib.sophia`.

    **Returns:** `step`.

    **Raises:** `ValueError` if `max_grad_norm` is not above 0, or `micro_batches` is below 1;
    `TypeError` for what is no loss or no optimizer. The step raises `ValueError` for a state that
    an earlier step has taken over, or that is of another optimizer, for a loss that returns
    something else, and for rows that `micro_batches` does not divide.
    """
    check_loss(loss)
    check_optimizer(optimizer)
    check_function("extra_args", extra_args, "the mean loss")
    max_grad_norm = None if max_grad_norm is None else as_number("max_grad_norm", max_grad_norm)
    if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
        raise ValueError(
            f"max_grad_norm must be a number above 0, or None for no clipping; got {max_grad_norm}."
        )
    micro_batches = as_integer("micro_batches", micro_batches, least=1)

    options = _Options(loss, optimizer, max_grad_norm, micro_batches, extra_args)
    update = jax.jit(partial(_update, options), donate_argnums=0, static_argnums=(3, 4))
    compiled: set[tuple] = set()

    @on_auto_axes(_as_before)
    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        check_usable(state)
        arrays, others = eqx.partition(state.frozen, eqx.is_array)
        leaves, structure = jax.tree.flatten(others)
        static = structure, tuple(leaves)
        changing = state.model, state.optimizer, state.step
        arguments = changing, arrays, batch, static, _shardings(changing)
        shapes = tuple(map(jax.typeof, jax.tree.leaves(batch)))
        if shapes not in compiled and compile_ahead_of_time(update, *arguments):
            compiled.add(shapes)
        (model, optimizer_state, count), metrics = update(*arguments)
        return State(model, state.frozen, optimizer_state, count), metrics

    return step


class _Options(NamedTuple):
    """Arguments of `make_step`."""

    loss: Loss
    optimizer: optax.GradientTransformation
    max_grad_norm: float | None
    micro_batches: int
    extra_args: Callable[[Callable[[Any], Array]], Mapping[str, Any]]


def _update(
    options: _Options,
    trainable_state: tuple[Any, Any, Array],
    frozen: Any,
    batch: Any,
    static: Any,
    shardings: tuple[NamedSharding | None, ...] | None,
) -> tuple[tuple[Any, Any, Array], Metrics]:
    """Model, optimizer state and number of updates after one more.

    **Arguments:** `frozen`: arrays of the part that is not trained. `static`: its other leaves and
    its structure. `shardings`: of the leaves of `trainable_state`, as `_shardings` gives them.
    """
    model, optimizer_state, count = trainable_state
    frozen = eqx.combine(frozen, jax.tree.unflatten(*static))
    check_made_by(options.optimizer, optimizer_state, model)
    objective = Objective(options.loss, _fast_params(frozen), batch, options.micro_batches)
    (total, weight), gradient = objective.gradient(_fast_params(model))
    value = mean_of((total, weight))
    weight = jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
    norm = _norm(gradient) / weight
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    extra = {
        "value": value,
        "grad": _scaled(gradient, 1 / weight),
        "value_fn": objective.mean,
        **options.extra_args(objective.mean),
    }
    factor = _clip_factor(norm, options.max_grad_norm) / weight
    transform = partial(_scaled_update, extended(options.optimizer, extra), factor)
    model, optimizer_state, finite = apply(transform, gradient, optimizer_state, model, finite)
    changed = _where_it_was((model, optimizer_state, count + 1), shardings)
    return changed, Metrics(value, weight, norm, finite)


def _clip_factor(
    norm: Float32[Array, ""], max_grad_norm: float | None
) -> Float32[Array, ""] | float:
    return 1.0 if max_grad_norm is None else jnp.minimum(1.0, max_grad_norm / norm)


def _scaled_update(
    update: Callable[..., Any],
    factor: Float32[Array, ""],
    gradient: Any,
    optimizer_state: Any,
    model: Any,
) -> Any:
    """The optimizer's update of a scaled gradient. All scaling is one factor, applied where the
    gradient is read: it is never copied."""
    return update(_scaled(gradient, factor), optimizer_state, model)


def _shardings(tree: Any) -> tuple[NamedSharding | None, ...] | None:
    """How the leaves are divided between devices; None where none is."""
    found = tuple(
        leaf.sharding
        if isinstance(leaf, jax.Array)
        and not isinstance(leaf, Tracer)
        and isinstance(leaf.sharding, NamedSharding)
        else None
        for leaf in jax.tree.leaves(tree)
    )
    return found if any(found) else None


def _where_it_was(tree: Any, shardings: tuple[NamedSharding | None, ...] | None) -> Any:
    # Left to the compiler, small leaves would move, and the next step be another program.
    if shardings is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    placed = [
        leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)
        for leaf, sharding in zip(leaves, shardings, strict=True)
    ]
    return structure.unflatten(placed)


def _as_before(arguments: dict[str, Any], result: Any) -> Any:
    """A new state is where the old one was; metrics are everywhere."""
    return jax.tree.map(spec_of, arguments["state"]), PartitionSpec()


def check_state(name: str, state: Any) -> None:
    """Refuses what is not a state of training.

    **Raises:** `TypeError`.
    """
    if not isinstance(state, State):
        raise TypeError(
            f"`{name}` must be a train.State, as from train.init(model, optimizer); got "
            f"{described(state)}."
        )


def check_usable(state: State) -> None:
    """Refuses a state whose buffers the next one has.

    **Raises:** `ValueError`; `TypeError` for what is no state.
    """
    check_state("state", state)
    count = state.step
    if isinstance(count, jax.Array) and not isinstance(count, Tracer) and count.is_deleted():
        raise ValueError(
            "A step has taken over the arrays of this state. Go on with the state it returned: "
            "`state, metrics = step(state, batch)`."
        )


def _fast_params(model: Any) -> Any:
    """The parameters that are differentiated: of a pair for `optax.lookahead` the fast ones."""
    return model.fast if isinstance(model, optax.LookaheadParams) else model


def _scaled(gradient: Any, factor: Float32[Array, ""]) -> Any:
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradient)


def _norm(tree: Any) -> Float32[Array, ""]:
    squares = map(sum_of_squares, jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
