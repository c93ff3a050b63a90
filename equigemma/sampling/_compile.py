"""Programs are compiled before they are called, and the compiler's memory is given back between."""

from collections.abc import Hashable
from typing import Any

import jax

from equigemma._trim_malloc import trim_malloc


_COMPILED: set[Hashable] = set()


def compile_once(program: Any, *arguments: Any) -> None:
    """Compiles what `jax.jit` made for arguments of kinds that it has not seen; a call after this
    finds it compiled. What the compiler leaves in the heap would lie beside the program's own.
    """
    leaves, structure = jax.tree.flatten(arguments)
    kind = program, structure, tuple(jax.typeof(leaf) for leaf in leaves)
    # The type stubs know no option that is also a context manager.
    if kind in _COMPILED or getattr(jax.config, "jax_disable_jit"):
        return
    program.lower(*arguments).compile()
    trim_malloc(arguments)
    _COMPILED.add(kind)
