"""How fast do tokens come, one after the other, here and elsewhere?

    python benchmarks/decode.py [--runs 7] [--depths 16 4096] [--new 64] [--gemma-python PATH]
        [--sides ours "ours in 8 bits" transformers gemma "llama.cpp in 8 bits"]

The real Gemma 3 270M, one text, greedy, behind a prompt of so many tokens of Python's own source.
With N new tokens the speed is (N − 1) / (T(N) − T(1)), T being the faster of two runs after
compiling. In bfloat16, but for those that say 8 bits: equal bits against equal bits. Every run is
a process of its own, sides by turns. `gemma` is DeepMind's package with its sampler, in the
environment of `tests/interop/requirements.txt` whose Python `--gemma-python` names.

Before any time is taken, all sides that can compute in float32 must give the same tokens in it.
"""

import argparse
import json
import os
import sys
import time

from machine import describe_machine
from peers import FLOATS, SIDES, in_a_process, prompt
from tables import spread


def measure(side: str, depth: int, new: int, dtype: str) -> dict:
    """Milliseconds of a token, and the tokens."""
    generate = SIDES[side](prompt(depth), new, dtype)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        generate(count)
        return time.perf_counter() - started

    tokens = generate(new)
    generate(1)
    times = [(seconds(new), seconds(1)) for _ in range(2)]
    long, short = (min(column) for column in zip(*times, strict=True))
    return {"ms": 1e3 * (long - short) / (new - 1), "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 4096])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--gemma-python")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, *options.depths, options.new, options.dtype)))
        sys.stdout.flush()
        os._exit(0)  # llama.cpp's server would wait
    if options.gemma_python is None:
        options.sides = [side for side in options.sides if side != "gemma"]

    def run(side: str, depth: int, new: int, dtype: str) -> dict:
        python = options.gemma_python if side == "gemma" else sys.executable
        arguments = ["--side", side, "--depths", str(depth), "--new", str(new), "--dtype", dtype]
        found = in_a_process(__file__, arguments, python)
        print(side, depth, dtype, f"{found['ms']:.1f} ms", file=sys.stderr, flush=True)
        return found

    floats = [side for side in FLOATS if side in options.sides]
    exact = {side: run(side, options.depths[0], 16, "float32")["tokens"] for side in floats}
    if len(set(map(tuple, exact.values()))) > 1:
        sys.exit(f"The tokens differ in float32: {exact}")

    print(describe_machine("jax", "equigemma", "torch", "transformers", "xllamacpp"))
    print(f"\n{options.new} new tokens, {options.runs} interleaved runs; median (range)\n")
    for depth in options.depths:
        rounds = [
            {side: run(side, depth, options.new, "bfloat16") for side in options.sides}
            for _ in range(options.runs)
        ]
        ours = [side for side in options.sides if side.startswith("ours")]
        header = ["after", "side", "tokens/s", *(f"speed of {side}" for side in ours)]
        print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
        for side in options.sides:
            speeds = [1e3 / found[side]["ms"] for found in rounds]
            ratios = (
                spread([found[side]["ms"] / found[our]["ms"] for found in rounds]) for our in ours
            )
            print(f"| {depth:,} | {side} | {spread(speeds)} | {' | '.join(ratios)} |")
        print(flush=True)


if __name__ == "__main__":
    main()
