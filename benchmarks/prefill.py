"""How long until a prompt is read, here and elsewhere?

    python benchmarks/prefill.py [--runs 7] [--lengths 512 4096] [--gemma-python PATH]
        [--other-python PATH]
        [--sides ours "ours in 8 bits" transformers gemma "llama.cpp in 8 bits"] [--write]

Prompts are the source of Python's own modules, one row; a figure is tokens of the prompt by the
time to the first new token, greedy, the fastest of three readings after compiling. The real Gemma 3
270M in bfloat16, but for the sides that say 8 bits. Every run is a process of its own, sides by
turns. `gemma` is DeepMind's package with its sampler, in the environment of
`tests/interop/requirements.txt` whose Python `--gemma-python` names, `--other-python` that of one
with another version of JAX, where ours run too.

Before any time is taken, all sides that can compute in float32 must give the same next token in it.
The share of the limit is that of multiplying, measured in every round: twice the parameters of the
layers by tokens per second, without attention and the embedding, against the operations per second
of `limits.py`. Memory is in `context.py`.
"""

import time
from pathlib import Path

import limits
from files import files_for, prompt
from peers import FLOATS, OTHER, PACKAGES, SIDES, add_sides, installed, python_of
from processes import answer, by_turns, in_a_process
from report import parser_of
from tables import column, ratios, spread, table


TIMED = 3


def measure(files: str, side: str, length: int, dtype: str) -> dict:
    """The next token, the seconds of the first reading, and those of the fastest after it."""
    made = SIDES[side.removesuffix(OTHER)](Path(files), prompt(Path(files), length), 1, dtype)
    seconds = []
    for _ in range(1 + TIMED):
        started = time.perf_counter()
        (token,) = made.generate(1)
        seconds.append(time.perf_counter() - started)
    return {"token": token, "seconds": min(seconds[1:]), "first": seconds[0]}


def main() -> None:
    parser = parser_of(__doc__, runs=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    add_sides(parser, [side for side in SIDES if not side.startswith("eg.")])
    options = parser.parse_args()
    sides, report = installed(options, *PACKAGES)

    with files_for(sides) as (files, parameters):

        def run(side: str, length: int, dtype: str = "bfloat16") -> dict:
            if side == limits.NAME:
                return in_a_process("limits.py")
            arguments = {"files": str(files), "side": side, "length": length, "dtype": dtype}
            return in_a_process("prefill.py", python=python_of(side, options), **arguments)

        for length in options.lengths:
            floats = [side for side in sides if side in FLOATS]
            (exact,) = by_turns(1, floats, lambda side: run(side, length, "float32"))
            tokens = {side: found["token"] for side, found in exact.items()}
            if len(set(tokens.values())) > 1:
                raise SystemExit(f"Next tokens differ in float32 after {length}: {tokens}")
        for length in options.lengths:
            rounds = by_turns(options.runs, [*sides, limits.NAME], lambda side: run(side, length))
            seconds = {side: column(rounds, side, "seconds") for side in sides}

            def row(side: str) -> list[str]:
                speeds = [length / each for each in seconds[side]]
                operations = [2 * parameters.layers * speed for speed in speeds]
                return [
                    f"{length:,}",
                    side,
                    spread(speeds),
                    spread(ratios(seconds[side], seconds[sides[0]])),
                    limits.share(rounds, operations, "operations"),
                    spread(column(rounds, side, "first")),
                    f"{sorted(set(column(rounds, side, 'token')))}",
                ]

            head = ["tokens", "side", "tokens/s", f"speed of {sides[0]}", "of the limit"]
            report.say(table([*head, "first call, s", "next token"], map(row, sides)))
            multiplying = spread(each / 1e9 for each in column(rounds, limits.NAME, "operations"))
            report.say(f"The limit at {length:,}: multiplying {multiplying} GFLOP/s.\n")


if __name__ == "__main__":
    answer(measure)
    main()
