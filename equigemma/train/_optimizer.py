"""Calls of an optax transformation: its extra arguments, its state, and updates that are finite."""

import re
import traceback
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import optax

from equigemma._kernels import Update, computed_apart, in_place, is_finite
from equigemma._typing import Array, Bool


def init_optimizer(optimizer: optax.GradientTransformation, parameters: Any) -> optax.OptState:
    """The optimizer's first state, in arrays of its own: a step takes over the buffers of all, and
    some are the parameters', one another's, or a key that the optimizer was made with.

    **Raises:** `ValueError` for `optax.lookahead` without its pair of parameters, or where optax
    has called a tree of labels as if it were a function of the parameters.
    """
    try:
        state = optimizer.init(parameters)
    except Exception as error:
        if _called_labels(error, parameters):
            raise ValueError(
                "optax has called a tree of labels of this optimizer: a tree of the model's class "
                "can be called like the model, and optax takes what can be called for a function "
                "of the parameters. Give it a function: `lambda params: labels`, or "
                "train.param_labels(...)."
            ) from error
        raise
    is_pair = isinstance(parameters, optax.LookaheadParams)
    if _has_lookahead(state) and not is_pair:
        raise ValueError(
            "optax.lookahead trains a pair of parameters: pass "
            "optax.LookaheadParams.init_synced(model) in place of the model; the trained one is "
            "train.merge(state).slow."
        )
    leaves, structure = jax.tree.flatten(state)
    del state
    for index, leaf in enumerate(leaves):
        # One by one, so that only one array is there twice.
        leaves[index] = jnp.copy(leaf)
    return jax.tree.unflatten(structure, leaves)


def check_made_by(optimizer: Any, state: optax.OptState, parameters: Any) -> None:
    """Refuses the state of another optimizer, by the classes that it is made of.

    **Raises:** `ValueError`.
    """
    expected = _classes(jax.eval_shape(optimizer.init, parameters))
    if (found := _classes(state)) != expected:
        raise ValueError(
            f"`state` is of another optimizer than that of train.make_step: it has "
            f"{', '.join(found) or 'nothing'}, and should have {', '.join(expected) or 'nothing'}. "
            "Pass the same one to train.init."
        )


def _classes(state: Any) -> list[str]:
    """The classes of an optimizer's states, in their order."""

    def is_state(part: Any) -> bool:
        return isinstance(part, tuple) and hasattr(part, "_fields")

    found = []
    for part in jax.tree.leaves(state, is_leaf=is_state):
        if is_state(part) and not isinstance(part, optax.EmptyState):
            found += [type(part).__name__, *_classes(tuple(part))]
    return found


def extended(optimizer: optax.GradientTransformation, extra: Mapping[str, Any]) -> Update:
    """`optimizer.update` with those of the extra arguments that it takes.

    A chain hands all that it gets to each of its transformations, and one of them may take fewer:
    only a call tells.
    """

    def update(gradient: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
        takes_extra = not _is_plain(optimizer)
        given = dict(extra) if takes_extra else {}
        while True:
            try:
                return optimizer.update(gradient, state, parameters, **given)
            except TypeError as error:
                found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
                if found is None or found[1] not in given:
                    raise
                del given[found[1]]

    return update


def apply(
    update: Update, gradient: Any, state: Any, parameters: Any, finite: Bool[Array, ""]
) -> tuple[Any, Any, Bool[Array, ""]]:
    """New parameters and a new state, or the old ones where not everything is finite, and which.

    **Arguments:** `finite`: whether all was finite until now.
    """
    program = in_place(update, gradient, state, parameters)
    if program is None:
        updates, new_state = update(gradient, state, parameters)
        new = optax.apply_updates(parameters, updates)
        finite = finite & _all_finite(updates, new, parameters)
        return _select(finite, new, parameters), _select(finite, new_state, state), finite
    # First for `finite` alone.
    once = computed_apart((gradient, state, parameters))
    updates, _ = update(*once)
    finite = finite & _all_finite(updates, optax.apply_updates(once[2], updates), once[2])
    updates, new_state = program.run(gradient, state, parameters, finite)
    new = optax.apply_updates(parameters, updates)
    return _select(finite, new, parameters), new_state, finite


def _is_plain(optimizer: optax.GradientTransformation) -> bool:
    is_transformation = isinstance(optimizer, optax.GradientTransformation)
    return is_transformation and not isinstance(optimizer, optax.GradientTransformationExtraArgs)


def _select(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new tree, or the old one; what the old one lacks is new in both cases."""
    olds = dict(jax.tree_util.tree_leaves_with_path(old))

    def one(path: Any, leaf: Any) -> Any:
        if path not in olds:
            return leaf
        is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended)
        before = olds[path] if is_key else jnp.asarray(olds[path], jnp.result_type(leaf))
        return jnp.where(finite, leaf, before)

    return jax.tree_util.tree_map_with_path(one, new)


def _all_finite(updates: Any, new: Any, old: Any) -> Bool[Array, ""]:
    """Whether no update makes a parameter infinite or not a number that was finite before."""

    def one(update: Any, new: Any, old: Any) -> Bool[Array, ""]:
        # The update is in the new value, unless the old one, of a mask perhaps, was not finite.
        return is_finite(jnp.where(jnp.isfinite(old), new, update))

    return jnp.stack(jax.tree.leaves(jax.tree.map(one, updates, new, old))).all()


def _has_lookahead(state: optax.OptState) -> bool:
    def is_lookahead(part: Any) -> bool:
        return isinstance(part, optax.LookaheadState)

    return any(map(is_lookahead, jax.tree.leaves(state, is_leaf=is_lookahead)))


def _called_labels(error: Exception, parameters: Any) -> bool:
    """Whether a function of optax, from which the error came, holds a tree of the parameters' class
    that it was not given as such, and called it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame, called in pairwise(frames):
        if _is_of_optax(frame) and not _is_of_optax(called):
            held = frame.f_locals.values()
            return any(type(one) is type(parameters) and one is not parameters for one in held)
    return False


def _is_of_optax(frame: Any) -> bool:
    return frame.f_globals.get("__name__", "").split(".")[0] == "optax"
