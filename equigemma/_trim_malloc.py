"""The heap of the C library: what is free goes back to the system."""

import ctypes


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
