"""What do the checks of shapes and dtypes cost?

    python benchmarks/shape_checks.py [--runs 3]

A tiny model, so that the checks are not lost in arithmetic: one call of `model(tokens)` as it is,
one under `jax.jit`, one of the shim's `apply`, and the tracing of `model` that compiling begins
with. Checks on and off (JAXTYPING_DISABLE=1), each in a process of its own, by turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import describe_machine


FIGURES = ("model, ms", "model under jit, ms", "apply of the shim, ms", "tracing, ms")


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """The fastest of a few times."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def measure() -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    import equigemma as eg
    from equigemma import linen

    real = eg.variants.get("gemma3-270m")
    config = replace(real, vocab=1_000, width=64, layers=real.layers[:6])
    model = eg.Transformer(config, key=jax.random.key(0), dtype=jnp.float32)
    tokens = jnp.ones((1, 8), jnp.int32)
    shim, variables = linen.Transformer(config=config), linen.to_variables(model)
    compiled = jax.jit(lambda model, tokens: model(tokens).logits)

    def wait(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(function(*arguments))

    def trace() -> Any:
        return jax.make_jaxpr(lambda model, tokens: model(tokens).logits)(model, tokens)

    calls = (
        (wait(model, tokens), 20),
        (wait(compiled, model, tokens), 300),
        (wait(shim.apply, variables, tokens), 300),
        (trace, 10),
    )
    return {
        figure: milliseconds(call, repeats)
        for figure, (call, repeats) in zip(FIGURES, calls, strict=True)
    }


def in_a_process(checked: bool) -> dict[str, float]:
    environment = os.environ | {"JAXTYPING_DISABLE": "0" if checked else "1"}
    command = [sys.executable, str(Path(__file__)), "--one"]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure()))
        return

    runs = [(in_a_process(True), in_a_process(False)) for _ in range(options.runs)]
    print(describe_machine("jax", "jaxtyping", "beartype", "equigemma"))
    print(f"\n6 layers of width 64, 8 tokens, {options.runs} interleaved runs, median\n")
    print("| | checked | unchecked |\n|---|---|---|")
    for figure in FIGURES:
        on, off = (statistics.median(run[side][figure] for run in runs) for side in (0, 1))
        print(f"| {figure} | {on:.3g} | {off:.3g} |")


if __name__ == "__main__":
    main()
