"""Compiles a step ahead of time, and returns the compiler's heap to the system (`malloc_trim`)."""

from typing import Any

import jax
from jax.core import Tracer

from equigemma._trim_malloc import trim_malloc


def compile_ahead_of_time(program: Any, *arguments: Any) -> bool:
    """Compiles what `jax.jit` made for these arguments, and returns the compiler's memory to the
    system, before it runs. A call after this finds the program compiled.

    **Returns:** whether that was done: not for arguments that are traced, and not where
    `jax.disable_jit` is on.
    """
    leaves = jax.tree.leaves(arguments)
    # The type stubs know no option that is also a context manager.
    compiles_nothing = getattr(jax.config, "jax_disable_jit")
    if compiles_nothing or any(isinstance(leaf, Tracer) for leaf in leaves):
        return False
    trim_malloc(arguments)
    program.lower(*arguments).compile()
    trim_malloc(arguments)
    return True
