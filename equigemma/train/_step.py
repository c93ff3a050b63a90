"""One step of training: a loss, its gradient, an optax update. Nothing is hidden or global."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from equigemma._memory import compile_apart
from equigemma._typing import Array, Float32, Int
from equigemma.train._in_place import update_in_place


Loss = Callable[[Any, Any], tuple[Float32[Array, ""], Float32[Array, ""]]]
"""`loss(model, batch) -> (sum over the targets, sum of their weights)`."""


class State(eqx.Module):
    """Everything that training changes, and the part of the model that it does not.

    `model` and `frozen` are halves of one tree, see `equinox.partition`.
    """

    model: Any
    frozen: Any
    optimizer: optax.OptState
    step: Int[Array, ""]  # updates made


class Metrics(NamedTuple):
    """Of one step. A step whose loss or gradient is not finite changes nothing but the count."""

    loss: Float32[Array, ""]  # mean over the weighted targets
    weight: Float32[Array, ""]  # their number, if weights are 0 and 1
    gradient_norm: Float32[Array, ""]
    finite: Array


def init(
    model: Any, optimizer: optax.GradientTransformation, *, trainable: Any = eqx.is_inexact_array
) -> State:
    """The state before the first step. What is trained is copied: the model stays usable, and costs
    its memory for as long as it is kept.

    **Arguments:** `trainable`: which leaves to train, as in `equinox.partition`: a function of a
    leaf, or a tree of booleans.

    **Raises:** `ValueError` if no leaf is to be trained.
    """
    trained, frozen = eqx.partition(model, trainable)
    if not jax.tree.leaves(trained):
        raise ValueError("Nothing is to be trained: `trainable` selects no array of the model.")
    # Steps take over the buffers of the state. Those that a file was read into are not JAX's own,
    # and would be there beside the new ones.
    trained = jax.tree.map(jnp.copy, trained)
    return State(trained, frozen, optimizer.init(trained), jnp.zeros((), jnp.int32))


def merge(state: State) -> Any:
    """The whole model."""
    return eqx.combine(state.model, state.frozen)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    clip: float | None = None,
    micro_batches: int = 1,
) -> Callable[[State, Any], tuple[State, Metrics]]:
    """A compiled `step(state, batch) -> (state, metrics)`.

    The buffers of the old state are taken over by the new one; the frozen part stays usable.

    **Arguments:**

    - `clip`: a gradient longer than this is made as short. `optax.clip_by_global_norm` does the
      same with a second copy of the gradient.
    - `micro_batches`: the first axis of every array of a batch is cut into so many parts, whose
      gradients are added up before one update. As losses are sums, divided by the weight of the
      whole batch at the end, the result is that of the batch as a whole, however its weights are
      spread.
    """

    def slope(trained, frozen, batch):
        def of_whole(trained):
            return loss(eqx.combine(trained, frozen), batch)

        (total, weight), gradient = jax.value_and_grad(of_whole, has_aux=True)(trained)
        return total, weight, gradient

    def summed_slope(trained, frozen, batch):
        if micro_batches == 1:
            return slope(trained, frozen, batch)

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, slope(trained, frozen, part)), None

        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        zero = jnp.zeros((), jnp.float32)
        blank = (zero, zero, jax.tree.map(jnp.zeros_like, trained))
        return jax.lax.scan(add, blank, parts)[0]

    @partial(jax.jit, donate_argnums=0)
    def update(changing, frozen, batch):
        model, optimizer_state, count = changing
        total, weight, gradient = summed_slope(model, frozen, batch)
        weight = jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
        # All scaling is one factor, applied where the gradient is read: it is never copied.
        norm = _norm(gradient) / weight
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        factor = 1 / weight if clip is None else jnp.minimum(1.0, clip / norm) / weight
        gradient = jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient)

        updates, optimizer_state = update_in_place(
            optimizer, gradient, optimizer_state, model, finite
        )
        new = optax.apply_updates(model, updates)
        model = jax.tree.map(partial(jnp.where, finite), new, model)
        return (model, optimizer_state, count + 1), Metrics(total / weight, weight, norm, finite)

    compiled: set[tuple] = set()

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        arguments = (state.model, state.optimizer, state.step), state.frozen, batch
        shapes = tuple(map(jax.typeof, jax.tree.leaves(batch)))
        if shapes not in compiled and compile_apart(update, *arguments):
            compiled.add(shapes)
        (model, optimizer_state, count), metrics = update(*arguments)
        return State(model, state.frozen, optimizer_state, count), metrics

    return step


def _norm(tree: Any) -> Float32[Array, ""]:
    squares = (jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
