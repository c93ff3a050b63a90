"""Updates of an optimizer's state in the memory that the state has."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from equigemma._typing import Array, Bool


def update_in_place(
    optimizer: optax.GradientTransformation,
    gradient: Any,
    state: Any,
    parameters: Any,
    keep: Bool[Array, ""],
) -> tuple[Any, Any]:
    """`optimizer.update(gradient, state, parameters)`; where `keep` is False, the old state.

    XLA would compute new moments twice, once to store them and once for the update, the second time
    from the old ones: of those it then has to make a copy, as large as the model. Here whatever is
    stored is stored first, and what follows from it is computed from what is stored.
    """
    arguments, structure = jax.tree.flatten((gradient, state, parameters))

    def update(*arguments: Array) -> tuple[Any, Any]:
        return optimizer.update(*jax.tree.unflatten(structure, arguments))

    closed, shapes = jax.make_jaxpr(update, return_shape=True)(*arguments)
    program = closed.jaxpr
    updates, new_state = map(jax.tree.structure, shapes)
    stored = program.outvars[updates.num_leaves :]
    times = Counter(variable for variable in stored if not isinstance(variable, Literal))
    olds = {
        variable: old
        for variable, old in zip(stored, jax.tree.leaves(state), strict=True)
        if times[variable] == 1
    }
    values = dict(zip(program.invars, arguments, strict=True))
    values |= dict(zip(program.constvars, closed.consts, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in program.eqns:
        results = _bind(equation, [read(variable) for variable in equation.invars])
        for variable, result in zip(equation.outvars, results, strict=True):
            if variable in olds:
                result = jnp.where(keep, result, olds[variable])
                result = jax.lax.optimization_barrier(result)
            values[variable] = result
    kept = [
        read(variable) if variable in olds else jnp.where(keep, read(variable), old)
        for variable, old in zip(stored, jax.tree.leaves(state), strict=True)
    ]
    changes = [read(variable) for variable in program.outvars[: updates.num_leaves]]
    return jax.tree.unflatten(updates, changes), jax.tree.unflatten(new_state, kept)


def _bind(equation: Any, arguments: list[Any]) -> list[Any]:
    parameters = equation.primitive.get_bind_params(equation.params)
    # Before jax 0.10 the functions that a primitive calls come apart from its other parameters.
    functions, parameters = parameters if isinstance(parameters, tuple) else ((), parameters)
    results = equation.primitive.bind(*functions, *arguments, **parameters)
    return results if equation.primitive.multiple_results else [results]
