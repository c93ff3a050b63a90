"""Memory that was freed, and that the C library keeps."""

import ctypes
from typing import Any

import jax
from jax.core import Tracer


def compile_apart(program: Any, *arguments: Any) -> bool:
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
    return_freed_memory()
    program.lower(*arguments).compile()
    return_freed_memory()
    return True


def return_freed_memory() -> None:
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
