"""Programs compiled from shapes alone, while the weights are on their way."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hlo import compilations

from equigemma import prepare, quantize, sampling
from equigemma.nn._block import Block
from equigemma.sampling import _stream
from equigemma.sampling._ahead import stream_ahead


PROMPT = jnp.asarray([2, 5, 7])
OPTIONS = {"max_new_tokens": 5, "key": jax.random.key(3), "sampler": sampling.make_sampler()}


def shapes_of(model):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)


@pytest.mark.parametrize("form", [lambda model: model, prepare, quantize.int8])
def test_nothing_is_compiled_once_the_model_is_there(form):
    model = form(tiny.model(tiny.GEMMA3))
    expected = np.array(list(sampling.stream(model, PROMPT, **OPTIONS)))
    jax.clear_caches()
    steps = stream_ahead(shapes_of(model), PROMPT, **OPTIONS)
    for each in steps.keywords["compiling"]:  # pyright: ignore[reportFunctionMemberAccess]
        each.result()
    with compilations() as made:
        found = np.array(list(steps(model)))
    assert made == []
    np.testing.assert_array_equal(found, expected)


def test_a_model_that_comes_early_waits_instead_of_compiling_too(monkeypatch):
    threads, call = set(), Block.__call__

    def noting(*arguments):
        threads.add(threading.current_thread())
        return call(*arguments)

    monkeypatch.setattr(Block, "__call__", noting)
    model = tiny.model(tiny.GEMMA3)
    jax.clear_caches()
    list(stream_ahead(shapes_of(model), PROMPT, **OPTIONS)(model))
    assert len(threads) == 1 and threading.main_thread() not in threads


def test_a_model_of_other_shapes_is_streamed_all_the_same():
    model = tiny.model(tiny.GEMMA3)
    steps = stream_ahead(shapes_of(tiny.model(tiny.GEMMA2)), PROMPT, **OPTIONS)
    expected = np.array(list(sampling.stream(model, PROMPT, **OPTIONS)))
    np.testing.assert_array_equal(np.array(list(steps(model))), expected)


def test_arguments_are_checked_before_there_are_weights():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        stream_ahead(shapes_of(tiny.model(tiny.GEMMA3)), PROMPT, max_new_tokens=0)


def test_what_fails_while_it_is_compiled_fails_where_it_is_called(monkeypatch):
    def failing(*arguments):
        raise ValueError("no such program")

    model = tiny.model(tiny.GEMMA3)
    monkeypatch.setattr(_stream, "advance", jax.jit(failing))
    steps = stream_ahead(shapes_of(model), PROMPT, **OPTIONS)(model)
    next(steps)
    with pytest.raises(ValueError, match="no such program"):
        next(steps)


def test_the_first_token_does_not_wait_for_the_program_of_the_others(monkeypatch):
    def unreached(*arguments):
        raise AssertionError

    monkeypatch.setattr(_stream, "advance", unreached)
    next(sampling.stream(tiny.model(tiny.GEMMA3), PROMPT, **OPTIONS))
