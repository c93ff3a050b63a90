"""A program of many layers is traced as fast as one of few, and stays the program that it was."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import tiny

from equigemma import sampling
from equigemma.nn._block import Block
from equigemma.sampling import _beam, _generate, _request, _stream
from equigemma.sampling._request import validate_and_pad


# Two kinds of layer, local and global, three and two of them.
MODEL = tiny.model(tiny.GEMMA3).with_layers([0, 1, 0, 1, 0])
GREEDY = sampling.Greedy()
REQUEST = validate_and_pad(
    MODEL,
    jnp.asarray([[2, 5, 7]]),
    max_new_tokens=4,
    stop_tokens=(),
    cache=None,
    sampler=GREEDY,
    num_samples=2,
)
STATE = eqx.filter_eval_shape(_request.start, MODEL, REQUEST, GREEDY)
LIMITS = _beam._Limits(jnp.asarray(4), jnp.asarray(1.0))

PROGRAMS = {
    "first token": (lambda: (_request.start, (MODEL, REQUEST, GREEDY)), 1),
    "next token": (lambda: (_stream.advance, (MODEL, STATE, GREEDY, REQUEST.stop_tokens)), 1),
    "whole answer": (lambda: (_generate._run, (MODEL, REQUEST, GREEDY, jnp.asarray(4))), 2),
    "beam search": (lambda: (_beam._run, (MODEL, REQUEST, None, LIMITS)), 2),
}


@pytest.fixture
def traced(monkeypatch):
    """The attention config of each block, each time that one is traced."""
    found, call = [], Block.__call__

    def noting(self, *args, **kwargs):
        found.append(self.attention.config)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Block, "__call__", noting)
    jax.clear_caches()
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_kind_of_layer_is_traced_once(name, traced):
    """Once for each number of tokens at a time: prompts come in chunks."""
    make, times = PROGRAMS[name]
    program, arguments = make()
    program.lower(*arguments)
    assert len(traced) == 2 * times
    assert len(set(traced)) == 2


def operations(text: str) -> list[str]:
    """In order. What the body of a loop takes from around it comes in the order of its first use,
    so names, loops and calls are left out."""
    lines = (re.sub(r"%\w+(:\d+)?(#\d+)?", "%", line).strip() for line in text.splitlines())
    return [line for line in lines if re.match(r'% = "?stablehlo\.(?!while)', line)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_is_that_of_layers_traced_one_by_one(name, traced, monkeypatch):
    make, times = PROGRAMS[name]
    program, arguments = make()
    once = operations(program.lower(*arguments).as_text())
    assert len(once) > 100
    jax.clear_caches()
    for module in (_generate, _request, _stream, _beam):
        monkeypatch.setattr(module, "trace_once", lambda model: model)
    traced.clear()
    assert operations(program.lower(*arguments).as_text()) == once
    assert len(traced) == 5 * times
