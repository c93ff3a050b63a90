"""Optimizer updates in the memory that the optimizer's state has.

XLA would compute new moments twice, once to store them and once for the update, the second time
from the old ones: of those it then has to make a copy, as large as the model. Here whatever is
stored is stored first, and what follows from it is computed from what is stored. That takes another
reading of the optimizer's program, which is done only of programs of known operations; all others
are left to XLA as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from equigemma._kernels._barrier import computed_apart
from equigemma._typing import Array, Bool


Update = Callable[[Any, Any, Any], tuple[Any, Any]]
"""`update(gradient, state, parameters) -> (updates, state)`, as of `optax`."""

# Pure, and so cheap that computing them twice costs less than memory for their results. Calls and
# branches are looked into.
KNOWN = frozenset(
    """
    abs add and ceil clamp convert_element_type copy copy_p cos div eq erf exp exp2 expm1 floor ge
    gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt
    select_n sign sin sqrt square sub tanh xor
    broadcast_in_dim concatenate expand_dims iota reshape slice squeeze transpose
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_sum
    """.split()
)
CALLS = frozenset({"jit", "pjit"})


class Program(NamedTuple):
    """The operations of one optimizer update."""

    closed: Any  # as `jax.make_jaxpr` gives it
    slots: dict[Any, int]  # which leaf of the state an operation's result is stored as
    updates: Any  # the trees of what it returns
    state: Any

    def run(self, gradient: Any, state: Any, parameters: Any, keep: Bool[Array, ""]) -> Any:
        """What `update` returns; where `keep` is False, the old state."""
        program, olds = self.closed.jaxpr, jax.tree.leaves(state)
        values = dict(zip(program.constvars, self.closed.consts, strict=True))
        arguments = jax.tree.leaves((gradient, state, parameters))
        values |= dict(zip(program.invars, arguments, strict=True))

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, Literal) else values[variable]

        for equation in program.eqns:
            results = _bind(equation, [read(variable) for variable in equation.invars])
            for variable, result in zip(equation.outvars, results, strict=True):
                if variable in self.slots:
                    result = jnp.where(keep, result, olds[self.slots[variable]])
                    result = computed_apart(result)
                values[variable] = result
        results = [read(variable) for variable in program.outvars]
        updates, stored = results[: self.updates.num_leaves], results[self.updates.num_leaves :]
        stored_above = set(self.slots.values())
        kept = [
            new if index in stored_above else jnp.where(keep, new, old)
            for index, (new, old) in enumerate(zip(stored, olds, strict=True))
        ]
        return jax.tree.unflatten(self.updates, updates), jax.tree.unflatten(self.state, kept)


def in_place(update: Update, gradient: Any, state: Any, parameters: Any) -> Program | None:
    """The program of `update` for such arguments; None if it is to be left as it is."""
    arguments, structure = jax.tree.flatten((gradient, state, parameters))

    def flat(*arguments: Array) -> tuple[Any, Any]:
        return update(*jax.tree.unflatten(structure, arguments))

    closed, (updates, new_state) = jax.make_jaxpr(flat, return_shape=True)(*arguments)
    if closed.effects or not _is_known(closed) or not _same(state, new_state):
        return None
    updates, new_state = jax.tree.structure(updates), jax.tree.structure(new_state)
    slots = _slots(closed.jaxpr, closed.jaxpr.outvars[updates.num_leaves :])
    return Program(closed, slots, updates, new_state)


def _slots(program: Any, stored: Sequence[Any]) -> dict[Any, int]:
    """Where each result is stored that an operation makes and that is stored once."""
    made = {variable for equation in program.eqns for variable in equation.outvars}
    found: dict[Any, list[int]] = {}
    for index, variable in enumerate(stored):
        # What the update was given, or knows beforehand, is not computed in any memory.
        if not isinstance(variable, Literal) and variable in made:
            found.setdefault(variable, []).append(index)
    return {variable: first for variable, (first, *others) in found.items() if not others}


def _is_known(program: Any) -> bool:
    return all(map(_is_known_operation, program.eqns))


def _is_known_operation(equation: Any) -> bool:
    name = equation.primitive.name
    if name in CALLS:
        return _is_known(equation.params["jaxpr"])
    if name == "cond":
        scalars = all(variable.aval.size == 1 for variable in equation.outvars)
        return scalars and all(map(_is_known, equation.params["branches"]))
    return name in KNOWN


def _same(one: Any, other: Any) -> bool:
    """Whether two trees are alike in structure, shapes and dtypes."""
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        (jnp.shape(leaf), jnp.result_type(leaf)) == (jnp.shape(twin), jnp.result_type(twin))
        for leaf, twin in zip(leaves, others, strict=True)
    )


def _bind(equation: Any, arguments: list[Any]) -> list[Any]:
    parameters = equation.primitive.get_bind_params(equation.params)
    # Before jax 0.10 the functions that a primitive calls come apart from its other parameters.
    functions, parameters = parameters if isinstance(parameters, tuple) else ((), parameters)
    results = equation.primitive.bind(*functions, *arguments, **parameters)
    return results if equation.primitive.multiple_results else [results]
