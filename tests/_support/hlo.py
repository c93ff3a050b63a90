"""What a compiled program does, read from its text: the operations that XLA runs one by one."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
from jax.stages import Compiled, Lowered


class Operation(NamedTuple):
    """One step of a program, outside of fusions: what it makes lies in memory afterwards."""

    computation: str
    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(")
_MAKES_NOTHING = {"parameter", "bitcast", "get-tuple-element", "tuple", "while", "constant"}


@contextmanager
def compilations() -> Iterator[list[float]]:
    """Seconds of each compilation within the block, as they come."""
    made: list[float] = []

    def listen(event: str, seconds: float, **_) -> None:
        if "backend_compile" in event:
            made.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield made
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def as_users_compile(lowered: Lowered) -> Compiled:
    """The program that users run; other tests take the one that is made fastest (`conftest`)."""
    options = {}
    if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
        options["xla_cpu_use_fusion_emitters"] = True
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        return lowered.compile(options)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def text_of(program: Compiled) -> str:
    text = program.as_text()
    assert text is not None, "this backend does not show its programs"
    return text


def operations(program: Compiled) -> list[Operation]:
    """All that make an array. A fusion is named by what it fuses, as in `select_convert_fusion`."""
    text = text_of(program)
    fused = set(re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            computation = start[1]
        elif (match := _OPERATION.match(line)) and computation not in fused:
            name, dtype, sizes, kind = match.groups()
            if kind not in _MAKES_NOTHING:
                kind = re.sub(r"[.\d]+$", "", name) if kind == "fusion" else kind
                shape = tuple(int(size) for size in sizes.split(",") if size)
                found.append(Operation(computation, kind, dtype, shape))
    return found


_BODY = re.compile(r"body=%?([\w.-]+)")


def loop_bodies(program: Compiled) -> set[str]:
    """The names of the computations that loops repeat."""
    return set(_BODY.findall(text_of(program)))


def with_inner_loops(program: Compiled, computation: str) -> set[str]:
    """`computation` and the bodies of the loops in it."""
    inner, within = {}, ""
    for line in text_of(program).splitlines():
        if start := _COMPUTATION.match(line):
            within = start[1]
        inner.setdefault(within, set()).update(_BODY.findall(line))
    found, new = set(), {computation}
    while new:
        found |= new
        new = set().union(*(inner[name] for name in new)) - found
    return found


def read_by_vector_products(program: Compiled) -> list[tuple[int, ...]]:
    """The shapes of all that fusions read in which a product gives a vector."""
    found, read, computation = [], [], ""
    for line in text_of(program).splitlines():
        if start := _COMPUTATION.match(line):
            computation, read = start[1], []
        elif match := _OPERATION.match(line):
            _, _, sizes, kind = match.groups()
            if kind == "parameter":
                read.append(tuple(int(size) for size in sizes.split(",") if size))
            elif kind == "dot" and "," not in sizes and computation.startswith("fused"):
                found += read
    return found
