"""The compiler's memory is given back before a generation runs, and nothing is compiled twice."""

from typing import Any

import jax
import jax.numpy as jnp
import tiny
from hlo import compilations

from equigemma import sampling
from equigemma.sampling import _compile, _generate


MODEL = tiny.model(tiny.GEMMA3)


def generate(length: int) -> None:
    sampling.generate(MODEL, jnp.arange(2, 2 + length), max_new_tokens=3)


def test_memory_is_given_back_once_and_before_the_program_runs(monkeypatch):
    events, run = [], _generate._run

    class Run:
        lower = run.lower

        def __call__(self, *arguments):
            events.append("run")
            return run(*arguments)

    jax.clear_caches()
    monkeypatch.setattr(_generate, "_run", Run())
    monkeypatch.setattr(_compile, "trim_malloc", lambda beside: events.append("trim"))
    generate(3)
    generate(4)
    assert events == ["trim", "run", "run"]


def test_a_call_finds_the_program_compiled(monkeypatch):
    generate(3)
    made_by_call = []
    run = _generate._run

    def counting(*arguments):
        with compilations() as made:
            state = run(*arguments)
        made_by_call.append(len(made))
        return state

    program: Any = counting
    program.lower = run.lower
    jax.clear_caches()
    monkeypatch.setattr(_generate, "_run", program)
    generate(3)
    assert made_by_call == [0]


def test_without_jit_nothing_is_compiled():
    with jax.disable_jit():
        sampling.generate(MODEL, jnp.array([2, 3]), max_new_tokens=1)
