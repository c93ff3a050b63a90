"""What do the checks of shapes and dtypes cost?

    python benchmarks/shape_checks.py [--runs 3] [--write]

A tiny model, so that the checks are not lost in arithmetic: one call of `model(tokens)` as it is,
one under `jax.jit`, one of the shim's `apply`, and the tracing of `model` that compiling begins
with. Checks on and off (JAXTYPING_DISABLE=1), each in a process of its own, by turns.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from processes import answer, by_turns, in_a_process
from report import Report, parser_of
from tables import column, spread, table


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


def main() -> None:
    options = parser_of(__doc__, runs=3).parse_args()
    report = Report(options, "jax", "jaxtyping", "beartype", "equigemma")

    def run(side: str) -> dict[str, float]:
        disabled = {"JAXTYPING_DISABLE": "1" if side == "unchecked" else "0"}
        return in_a_process("shape_checks.py", environment=disabled)

    sides = ("checked", "unchecked")
    rounds = by_turns(options.runs, sides, run)
    report.say("6 layers of width 64, 8 tokens.\n")
    rows = [
        [figure, *(spread(column(rounds, side, figure)) for side in sides)] for figure in FIGURES
    ]
    report.say(table(["", *sides], rows))


if __name__ == "__main__":
    answer(measure)
    main()
