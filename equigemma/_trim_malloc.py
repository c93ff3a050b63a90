"""The heap of the C library: what is free goes back to the system."""

import ctypes
import math
from typing import Any

import jax


WORTH_IT = 64 << 20
"""Bytes of arrays below which the heap is left alone: to walk through it takes longer, and what is
given back is asked for again by the next program.
"""


def trim_malloc(beside: Any) -> None:
    """Gives freed memory back to the system, if the C library is one that keeps it and is asked.

    The compiler and the readers of files make millions of small objects. glibc keeps their memory
    for the next ones, beside the large arrays, for which it asks the system anew.

    **Arguments:** `beside`: a pytree of the arrays, or their shapes, that take memory meanwhile.
    Where they are small, nothing is done.

    **Source:** `malloc_trim(3)`.
    """
    leaves = [leaf for leaf in jax.tree.leaves(beside) if hasattr(leaf, "dtype")]
    if sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) < WORTH_IT:
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    trim(0)
