"""Streaming with a model that is still being loaded: its programs are compiled in the meantime."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, SupportsIndex

import jax

from equigemma._arguments import as_integer
from equigemma._trim_malloc import trim_malloc
from equigemma._typing import Array, ArrayLike, DTypeLike, Integer
from equigemma.nn import Transformer
from equigemma.sampling import _stream
from equigemma.sampling._request import GenerationRequest, Ids, validate_and_pad
from equigemma.sampling._sampler import AbstractSampler, Greedy


def stream_ahead(
    shapes: Transformer,
    tokens: Integer[ArrayLike, "*B L"] | Sequence[Any],
    *,
    max_new_tokens: SupportsIndex,
    sampler: AbstractSampler = Greedy(),
    stop_tokens: Ids = (),
    key: Array | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Callable[[Transformer], _stream.TokenStream]:
    """`stream` as a function of the model, whose two programs a thread compiles from now on.

    Called while they are compiled, the function waits for that of the first token, and before the
    second one for the other. A model of other shapes is compiled for as always.

    **Arguments:** `shapes`: the model with a `jax.ShapeDtypeStruct` in place of each array. The
    others, and errors, are those of `stream`.
    """
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens)
    request = validate_and_pad(
        shapes,
        tokens,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        cache=None,
        sampler=sampler,
        key=key,
        cache_dtype=cache_dtype,
        caller="sampling.stream",
    )
    # One after the other: the first token is waited for, and both share the processor with what
    # reads the weights.
    with_thread = ThreadPoolExecutor(1)
    compiling = [with_thread.submit(_compile_first, shapes, request, sampler)]
    if max_new_tokens > 1:
        compiling.append(with_thread.submit(_compile_next, shapes, request, sampler))
    with_thread.shutdown(wait=False)
    return partial(
        _stream.TokenStream,
        request=request,
        sampler=sampler,
        max_new_tokens=max_new_tokens,
        compiling=compiling,
    )


# What fails here fails again, and is told, where the programs are called.


def _compile_first(
    shapes: Transformer, request: GenerationRequest, sampler: AbstractSampler
) -> None:
    _stream.first.lower(shapes, request, sampler).compile()
    trim_malloc(shapes)


def _compile_next(
    shapes: Transformer, request: GenerationRequest, sampler: AbstractSampler
) -> None:
    state, _ = jax.eval_shape(_stream.first, shapes, request, sampler)
    _stream.advance.lower(shapes, state, sampler, request.stop_tokens).compile()
    trim_malloc(shapes)
