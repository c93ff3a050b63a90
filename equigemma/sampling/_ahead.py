"""Streaming with a model that is still being loaded: its programs are compiled in the meantime."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, SupportsIndex

import jax
import numpy as np

from equigemma._arguments import as_integer
from equigemma._typing import Array, ArrayLike, DTypeLike, Integer
from equigemma.nn import Transformer
from equigemma.sampling import _generate
from equigemma.sampling._call import Call, Ids, prepare
from equigemma.sampling._choose import AbstractChoice, Greedy


def stream_ahead(
    shapes: Transformer,
    tokens: Integer[ArrayLike, "*B L"] | Sequence[Any],
    *,
    max_new_tokens: SupportsIndex,
    choose: AbstractChoice = Greedy(),
    stop: Ids = (),
    key: Array | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Callable[[Transformer], Iterator[np.ndarray]]:
    """`stream` as a function of the model, whose two programs a thread compiles from now on.

    Called while they are compiled, the function waits for that of the first token, and before the
    second one for the other. A model of other shapes is compiled for as always.

    Args:
        shapes: the model with a `jax.ShapeDtypeStruct` in place of each array.

    The other arguments, and errors, are those of `stream`.
    """
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens)
    call = prepare(
        shapes,
        tokens,
        max_new_tokens=max_new_tokens,
        stop=stop,
        cache=None,
        rule=choose,
        key=key,
        cache_dtype=cache_dtype,
        caller="sampling.stream",
    )
    # One after the other: the first token is waited for, and both share the processor with what
    # reads the weights.
    with_thread = ThreadPoolExecutor(1)
    compiling = [with_thread.submit(_compile_first, shapes, call, choose)]
    if max_new_tokens > 1:
        compiling.append(with_thread.submit(_compile_next, shapes, call, choose))
    with_thread.shutdown(wait=False)
    return partial(
        _generate._steps,
        call=call,
        choose=choose,
        max_new_tokens=max_new_tokens,
        compiling=compiling,
    )


# What fails here fails again, and is told, where the programs are called.


def _compile_first(shapes: Transformer, call: Call, choose: AbstractChoice) -> None:
    _generate._first.lower(shapes, call, choose).compile()


def _compile_next(shapes: Transformer, call: Call, choose: AbstractChoice) -> None:
    state, _ = jax.eval_shape(_generate._first, shapes, call, choose)
    _generate._advance.lower(shapes, state, choose, call.stop).compile()
