"""Compiles a step ahead of time, and returns the compiler's heap to the system (`malloc_trim`)."""

import ctypes
from typing import Any

import jax
from jax.core import Tracer


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
    trim_malloc()
    program.lower(*arguments).compile()
    trim_malloc()
    return True


def trim_malloc() -> None:
    """Gives freed memory back to the system, if the C library is one that keeps it and is asked.

    The compiler and the readers of files make millions of small objects. glibc keeps their memory
    for the next ones, beside the large arrays, for which it asks the system anew.

    **Source:** `malloc_trim(3)`.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    trim(0)
