"""Loops that end when a value on the device says so."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax

from equigemma._typing import Array, Bool


_State = TypeVar("_State")

STEPS = 16
"""Steps that an accelerator takes before it is asked whether to go on."""


def while_loop(
    goes_on: Callable[[_State], Bool[Array, ""]],
    step: Callable[[_State], _State],
    masked: Callable[[_State], _State],
    state: _State,
) -> _State:
    """`jax.lax.while_loop(goes_on, step, state)`; elsewhere than on CPU, asking once in `STEPS`
    steps whether to go on: a GPU waits for its host for that. Not measured on a GPU yet.

    **Arguments:** `masked`: what takes the place of `step` there; it changes nothing once the loop
    would have ended.
    """
    each, runs = partial(_one_by_one, goes_on, step), partial(_in_runs, goes_on, masked)
    result: Any = jax.lax.platform_dependent(state, cpu=each, default=runs)
    return result


def _one_by_one(goes_on: Callable, step: Callable, state: _State) -> _State:
    return jax.lax.while_loop(goes_on, step, state)


def _in_runs(goes_on: Callable, masked: Callable, state: _State) -> _State:
    def run(state: _State) -> _State:
        return jax.lax.fori_loop(0, STEPS, lambda _, state: masked(state), state)

    return jax.lax.while_loop(goes_on, run, state)
