"""How long until a prompt is read, here and elsewhere, and how much memory does a long one take?

    python benchmarks/prefill.py [--runs 7] [--lengths 512 4096] [--gemma-python PATH]
        [--sides ours "ours in 8 bits" transformers gemma "llama.cpp in 8 bits"]
    python benchmarks/prefill.py --memory 32768

Prompts are the source of Python's own modules, one row; a figure is tokens of the prompt by the
time to the first new token, greedy, the fastest of three readings after compiling. The real Gemma 3
270M in bfloat16, but for the sides that say 8 bits. Every run is a process of its own, sides by
turns. `gemma` is DeepMind's package with its sampler, in the environment of
`tests/interop/requirements.txt` whose Python `--gemma-python` names. Before any time is taken, all
sides that can compute in float32 must give the same next token in it. With `--memory` the peak of
one process of ours that reads so many tokens.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from machine import describe_machine
from peers import FLOATS, MODEL, SIDES, in_a_process, prompt
from tables import spread


TIMED = 3


def measure(side: str, length: int, dtype: str) -> dict:
    """The next token, the seconds of the first reading, and those of the fastest after it."""
    generate = SIDES[side](prompt(length), 1, dtype)
    seconds = []
    for _ in range(1 + TIMED):
        started = time.perf_counter()
        (token,) = generate(1)
        seconds.append(time.perf_counter() - started)
    return {"token": token, "seconds": min(seconds[1:]), "first": seconds[0]}


def memory(length: int) -> dict:
    """Gigabytes of the process: with the model in memory, and at most while it reads."""
    import jax.numpy as jnp

    import equigemma as eg

    model, _ = eg.load(MODEL, dtype="bfloat16")
    tokens = jnp.asarray(prompt(length))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    started = time.perf_counter()
    eg.sampling.generate(model, tokens, max_new_tokens=1).tokens.block_until_ready()
    seconds = time.perf_counter() - started
    return {"before": before, "peak": _status("VmHWM"), "seconds": seconds}


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--memory", type=int, nargs="+", default=[])
    parser.add_argument("--gemma-python")
    parser.add_argument("--one", choices=[*SIDES, "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        (length,) = options.lengths
        if options.one == "memory":
            found = memory(length)
        else:
            found = measure(options.one, length, options.dtype)
        print(json.dumps(found), flush=True)
        os._exit(0)  # llama.cpp's server would wait
    if options.gemma_python is None:
        options.sides = [side for side in options.sides if side != "gemma"]

    def run(side: str, length: int, dtype: str = "bfloat16") -> dict:
        python = options.gemma_python if side == "gemma" else sys.executable
        arguments = ["--one", side, "--lengths", str(length), "--dtype", dtype]
        found = in_a_process(__file__, arguments, python)
        print(side, length, dtype, found, file=sys.stderr, flush=True)
        return found

    print(describe_machine("jax", "equigemma", "torch", "transformers", "xllamacpp"))
    if options.memory:
        print("\n| tokens | model in memory, GB | peak while reading, GB | s, with compiling |")
        print("|---|---|---|---|")
        for length in options.memory:
            found = run("memory", length)
            cells = (found["before"], found["peak"], found["seconds"])
            print(f"| {length:,} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
        return
    floats = [side for side in FLOATS if side in options.sides]
    for length in options.lengths:
        exact = {side: run(side, length, "float32")["token"] for side in floats}
        if len(set(exact.values())) > 1:
            sys.exit(f"Next tokens differ in float32 after {length}: {exact}")
    print("\n| tokens | side | tokens/s | speed of ours, in pairs | first call, s | next token |")
    print("|---|---|---|---|---|---|")
    for length in options.lengths:
        rounds = [{side: run(side, length) for side in options.sides} for _ in range(options.runs)]
        for side in options.sides:
            speeds = [length / r[side]["seconds"] for r in rounds]
            ratios = [r[side]["seconds"] / r[options.sides[0]]["seconds"] for r in rounds]
            first = [r[side]["first"] for r in rounds]
            tokens = sorted({r[side]["token"] for r in rounds})
            cells = f"{spread(speeds)} | {spread(ratios)} | {spread(first)} | {tokens}"
            print(f"| {length:,} | {side} | {cells} |")


if __name__ == "__main__":
    main()
