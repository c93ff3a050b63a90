"""Memory that was freed, and that the C library keeps."""

import ctypes
from typing import Any

import jax


def compile_apart(program: Any, *arguments: Any) -> None:
    """Compiles what `jax.jit` made for such arguments; of that nothing is left when it then runs.

    A call right after this finds the program made. Nothing happens while something else is traced.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
        return
    return_freed_memory()
    program.lower(*arguments).compile()
    return_freed_memory()


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
