"""Arguments as people have them: lists, NumPy arrays, integers of any width, dtypes by name.

Each function gives what the package computes with, or says in one sentence what the argument, which
it calls by the caller's name for it, must be.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from equigemma._typing import Array, ArrayLike, DTypeLike, Int, Integer, PRNGKeyArray


def as_ids(name: str, value: Integer[ArrayLike, "..."] | Sequence[Any]) -> Int[Array, "..."]:
    """Integers as an int32 array. Those beyond its range become the largest or the smallest.

    **Raises:** `TypeError` for what is not integers; `ValueError` for rows of different lengths.
    """
    array = value if isinstance(value, jax.Array | np.ndarray) else _from_list(name, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"`{name}` must be integers, got {described(array)}. `tokenizer.encode` makes token "
            "ids of a text."
        )
    bounds, range_ = jnp.iinfo(array.dtype), np.iinfo(np.int32)
    if bounds.max > range_.max:
        array = array.clip(max(bounds.min, range_.min), range_.max)
    return jnp.asarray(array, jnp.int32)


def _from_list(name: str, value: Any) -> Array | np.ndarray:
    leaves = jax.tree.leaves(value)
    if any(isinstance(leaf, str | bytes) for leaf in leaves):
        raise TypeError(
            f"`{name}` must be integers, got text. `tokenizer.encode` makes token ids of it."
        )
    if not leaves and isinstance(value, Sequence):
        return np.zeros(np.shape(value), np.int32)
    try:
        return jnp.asarray(value) if any(map(_is_traced, leaves)) else np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must have rows of equal length. Fill the shorter ones up with -1 where that "
            "is padding, as in `sampling.generate`, or call once for each row."
        ) from error


def as_id_tuple(
    name: str, value: Iterable[SupportsIndex] | Integer[ArrayLike, " ids"]
) -> tuple[int, ...]:
    """Ids in a list, a set or an array as a tuple.

    **Raises:** `TypeError` for anything else.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"`{name}` must be a list of token ids, got {value!r}.")
    return tuple(as_integer(f"{name}[{index}]", one) for index, one in enumerate(value))


def as_integer(name: str, value: Any, *, least: int | None = None) -> int:
    """A whole number of any integer type.

    **Raises:** `TypeError` for another type; `ValueError` if it is below `least`.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be a whole number, got {described(value)}.") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


def as_number(name: str, value: Any) -> float:
    """A real number of any type.

    **Raises:** `TypeError` for another type.
    """
    is_scalar = isinstance(value, int | float | np.number | jax.Array | np.ndarray)
    if not is_scalar or isinstance(value, bool) or np.shape(value) or _is_traced(value):
        raise TypeError(f"`{name}` must be a number, got {described(value)}.")
    return float(value)


def as_float_dtype(name: str, value: DTypeLike, *, or_: Sequence[DTypeLike] = ()) -> jnp.dtype:
    """A dtype of floats of at least 16 bits, given as such, as a scalar type or by its name.

    **Arguments:** `or_`: others that are accepted as well.

    **Raises:** `TypeError` for other dtypes, and for float64 without `jax_enable_x64`.
    """
    others = [jnp.dtype(other) for other in or_]
    try:
        # Of None, NumPy makes float64.
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        dtype = None
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
    if dtype is None or not (is_float or dtype in others):
        names = ", ".join(["bfloat16", "float16", "float32", *(other.name for other in others)])
        raise TypeError(
            f"`{name}` must be one of {names}; got {value if dtype is None else dtype!s}."
        )
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise TypeError(f'`{name}`: float64 needs `jax.config.update("jax_enable_x64", True)`.')
    return dtype


def bucketed(length: int, least: int) -> int:
    """The next power of two, at least `least`: few compiled programs serve all lengths."""
    return max(least, 1 << (length - 1).bit_length())


def check_kind(name: str, value: Any, kind: type, advice: str) -> None:
    """Refuses a value of another class. `advice` is a sentence that says where to get one.

    **Raises:** `TypeError`.
    """
    if not isinstance(value, kind):
        wanted = with_article(kind.__name__)
        raise TypeError(f"`{name}` must be {wanted}, got {described(value)}. {advice}")


def check_known(caller: str, advice: str, **arguments: Any) -> None:
    """Refuses arrays without values: those of `jit`, `vmap` and `grad`. `advice` is a sentence that
    says what to do within them.

    **Raises:** `TypeError`.
    """
    for name, value in arguments.items():
        if any(map(_is_traced, jax.tree.leaves(value))):
            raise TypeError(
                f"`{caller}` cannot be called within jit, vmap or grad: it must know the values of "
                f"`{name}`. Call it outside of them. {advice}"
            )


def described(value: Any) -> str:
    """A value in few words: arrays by dtype and shape, as jaxtyping writes them."""
    if isinstance(value, jax.Array | np.ndarray) and (value.ndim or _is_key(value)):
        return f"{value.dtype.name}[{','.join(map(str, value.shape))}]"
    shown = repr(value)
    is_short = len(shown) <= 60 and "\n" not in shown
    return shown if is_short else with_article(type(value).__name__)


def with_article(noun: str) -> str:
    """`noun`, after "a" or "an"."""
    return f"{'an' if noun[:1] in tuple('AEIOaeio') else 'a'} {noun}"


def as_key(name: str, value: Any) -> PRNGKeyArray:
    """One key of JAX, of either kind.

    **Raises:** `ValueError` for anything else.
    """
    is_array = isinstance(value, jax.Array)
    is_raw = is_array and value.dtype == np.uint32 and value.shape in ((2,), (4,))
    if not (is_raw or is_array and _is_key(value) and not value.ndim):
        raise ValueError(f"{name} must be a key such as jax.random.key(0), got {described(value)}.")
    return value


def _is_key(value: Array | np.ndarray) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _is_traced(value: Any) -> bool:
    return isinstance(value, Tracer)
