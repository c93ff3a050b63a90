"""How fast does this machine read memory, and how fast does it multiply, at best?

    python benchmarks/limits.py [--runs 7] [--write]

In a process of its own: bytes per second of a product of a matrix of 1.07 GB in float32, far more
than caches hold, with a vector; and floating-point operations per second of a product of two
matrices in bfloat16 with results in float32, 1,024 x 4,096 by 4,096 x 4,096. The fastest of five
each. `decode.py` and `prefill.py` measure the same between their sides, and tell what share of it
each side reaches.
"""

import time
from collections.abc import Callable, Iterable

from processes import answer, by_turns, in_a_process
from report import Report, parser_of
from tables import Rounds, column, spread, table


NAME = "limits"
ROWS, WIDTH = 65_536, 4_096
TIMES = 5


def measure() -> dict:
    """Bytes per second, and operations per second."""
    import jax
    import jax.numpy as jnp

    def fastest(call: Callable[[], jax.Array]) -> float:
        call().block_until_ready()
        seconds = []
        for _ in range(TIMES):
            started = time.perf_counter()
            call().block_until_ready()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def ones(*shape: int, dtype) -> jax.Array:
        return jnp.ones(shape, dtype)

    read = jax.jit(lambda matrix, vector: matrix @ vector)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    large, vector = ones(ROWS, WIDTH, dtype=jnp.float32), ones(WIDTH, dtype=jnp.float32)
    rows, square = ones(1024, WIDTH, dtype=jnp.bfloat16), ones(WIDTH, WIDTH, dtype=jnp.bfloat16)
    return {
        "bytes": large.nbytes / fastest(lambda: read(large, vector)),
        "operations": 2 * rows.size * WIDTH / fastest(lambda: multiply(rows, square)),
    }


def share(rounds: Rounds, used: Iterable[float], limit: str) -> str:
    """In %, of `used` in each round, `limit` being a figure that `measure` took in the same."""
    limits = column(rounds, NAME, limit)
    return spread(100 * one / most for one, most in zip(used, limits, strict=True)) + " %"


def main() -> None:
    options = parser_of(__doc__, runs=7).parse_args()
    report = Report(options, "jax", "jaxlib")
    rounds = by_turns(options.runs, [NAME], lambda _: in_a_process("limits.py"))
    reading, multiplying = (
        spread(value / 1e9 for value in column(rounds, NAME, figure))
        for figure in ("bytes", "operations")
    )
    report.say(table(["reading, GB/s", "multiplying, GFLOP/s"], [[reading, multiplying]]))


if __name__ == "__main__":
    answer(measure)
    main()
