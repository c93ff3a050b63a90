"""How fast do tokens come, one after the other, here and elsewhere?

    python benchmarks/decode.py [--runs 7] [--depths 16 4096] [--new 64] [--capacity 1024]
        [--gemma-python PATH] [--other-python PATH]
        [--sides ours "ours in 8 bits" eg.generate eg.stream transformers gemma
        "llama.cpp in 8 bits"] [--write]

The real Gemma 3 270M, one text, greedy, behind a prompt of so many tokens of Python's own source.
With N new tokens the speed is (N − 1) / (T(N) − T(1)), T being the faster of two runs after
compiling, in which the prompt comes from a cache. In bfloat16, but for those that say 8 bits: equal
bits against equal bits. Every run is a process of its own, sides by turns. `ours` is the bare loop
on ids; `eg.generate` and `eg.stream` go from text to text, and read the prompt in every run: behind
more than 1,024 tokens, where a difference of two times would say more of that, they are left out.
`gemma` is DeepMind's package with its sampler, in the environment of
`tests/interop/requirements.txt` whose Python `--gemma-python` names; `--other-python` names one
with another version of JAX, where ours run too. Caches have room for `--capacity` tokens, or as
many as there are if those are more; that of `transformers` grows.

Before any time is taken, all sides that can compute in float32 must give the same tokens in it. In
fewer bits they part somewhere: the table says after how many tokens. The share of the limit is
that of reading memory, measured in every round: bytes of all weights by tokens per second, without
the cache's, against the bytes per second of `limits.py`.
"""

import argparse
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import limits
from files import files_for, prompt
from machine import peak_memory
from peers import FLOATS, OTHER, PACKAGES, SIDES, TEXT, add_sides, installed, python_of
from processes import answer, by_turns, in_a_process
from report import parser_of
from tables import column, ratios, spread, table


LONGEST_READ = 1024
"""Tokens of a prompt that may be read anew in every run."""


def measure(
    files: str, side: str, depth: int, new: int, dtype: str, capacity: int = 0, pairs: int = 2
) -> dict:
    """Tokens, those that resume, seconds of one, bytes of weights, and the peak of memory in GB.

    `first` are the seconds of the first generation, which compiles. The peak is that of loading and
    then that of a whole generation. Without `pairs` nothing is timed.
    """
    made = SIDES[side.removesuffix(OTHER)](
        Path(files), prompt(Path(files), depth), new, dtype, capacity
    )
    found = {"weights": made.weights, "loading": peak_memory()}
    started = time.perf_counter()
    found["tokens"] = made.generate(new)
    found["first"] = time.perf_counter() - started
    found["peak"] = peak_memory()
    again = made.resume or made.generate

    def seconds(count: int) -> float:
        started = time.perf_counter()
        again(count)
        return time.perf_counter() - started

    if pairs:
        if made.resume:
            found["resumed"] = again(new)
            again(1)
        times = [(seconds(new), seconds(1)) for _ in range(pairs)]
        long, short = (min(column) for column in zip(*times, strict=True))
        found["seconds"] = (long - short) / (new - 1)
    return found


def runner(files: Path, options: argparse.Namespace) -> Callable[..., dict]:
    """`run(side, depth, new, ...)`: `measure`, or the limits, in a process of its own."""
    capacity = getattr(options, "capacity", 0)

    def run(side: str, depth: int, new: int, dtype: str = "bfloat16", pairs: int = 2) -> dict:
        if side == limits.NAME:
            return in_a_process("limits.py")
        sizes = {"depth": depth, "new": new, "capacity": capacity, "pairs": pairs}
        return in_a_process(
            "decode.py",
            python=python_of(side, options),
            files=str(files),
            side=side,
            dtype=dtype,
            **sizes,
        )

    return run


def check_tokens(run: Callable[..., dict], sides: list[str], depth: int, new: int) -> None:
    """Ends the script if the sides do not give the same tokens in float32."""
    floats = [side for side in sides if side in FLOATS]
    (found,) = by_turns(1, floats, lambda side: run(side, depth, new, "float32", pairs=1))
    kinds = ("tokens", "resumed")
    tokens = {side: [each[kind] for kind in kinds if kind in each] for side, each in found.items()}
    if len({tuple(each) for both in tokens.values() for each in both}) > 1:
        raise SystemExit(f"The tokens differ in float32: {tokens}")


def main() -> None:
    parser = parser_of(__doc__, runs=7)
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 4096])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--capacity", type=int, default=1024)
    add_sides(parser, SIDES)
    options = parser.parse_args()
    sides, report = installed(options, *PACKAGES)
    ours = [side for side in ("ours", "ours in 8 bits") if side in sides]

    with files_for(sides) as (files, _):
        run = runner(files, options)
        check_tokens(run, sides, options.depths[0], 16)
        report.say(
            f"{options.new} new tokens, room for {options.capacity:,}; the same 16 in float32.\n"
        )
        for depth in options.depths:
            resumed = [side for side in sides if side not in TEXT]
            timed = sides if depth <= LONGEST_READ else resumed or sides
            rounds = by_turns(
                options.runs, [*timed, limits.NAME], lambda side: run(side, depth, options.new)
            )
            seconds = {side: column(rounds, side, "seconds") for side in timed}
            first = rounds[0][timed[0]]["tokens"]

            def row(side: str) -> list[str]:
                speeds = [1 / each for each in seconds[side]]
                read = [
                    found[side]["weights"] * speed
                    for found, speed in zip(rounds, speeds, strict=True)
                ]
                return [
                    f"{depth:,}",
                    side,
                    spread(speeds),
                    *(spread(ratios(seconds[side], seconds[our])) for our in ours),
                    limits.share(rounds, read, "bytes"),
                    spread(column(rounds, side, "first")),
                    f"{agreement(first, rounds[0][side]['tokens'])}",
                ]

            speed_of = [f"speed of {our}" for our in ours]
            head = ["after", "side", "tokens/s", *speed_of, "of the limit"]
            report.say(table([*head, "first call, s", "tokens alike"], map(row, timed)))
            reading = spread(each / 1e9 for each in column(rounds, limits.NAME, "bytes"))
            report.say(f"The limit after {depth:,}: reading {reading} GB/s.\n")


def agreement(one: list[int], other: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    pairs = zip(one, other, strict=True)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


if __name__ == "__main__":
    answer(measure)
    main()
