"""How long from `equigemma generate` to the first token, and how fast is it from there on?

    python benchmarks/command_line.py [--runs 5] [--tokens 64] [--dtype bfloat16]

Every run is a process of its own. Cold: no compiled program is kept from before (the weights file
has been put together, the operating system has it cached). Warm: a second start. Needs the extra
`demo`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine

from equigemma.checkpoint._embedded import embedded_file


PROMPT = "The capital of France is"


def run(cache: Path, dtype: str, tokens: int) -> tuple[float, float, float]:
    """Seconds to the first token, tokens per second after it, and peak memory in GB."""
    command = [sys.executable, "-c", "from equigemma.cli import main; main()", "generate", PROMPT]
    command += ["--max-new-tokens", str(tokens), "--dtype", dtype]
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
    )
    assert process.stdout is not None
    descriptor, seen = process.stdout.fileno(), b""
    while len(seen) <= len(PROMPT):
        piece = os.read(descriptor, 4096)
        if not piece:
            raise RuntimeError("The command ended before its first token.")
        seen += piece
    first = time.perf_counter()
    while os.read(descriptor, 4096):
        last = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"The command failed with status {status}.")
    return first - started, (tokens - 1) / (last - first), usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    embedded_file("gemma3-270m")

    results: dict[str, list[tuple[float, float, float]]] = {"cold": [], "warm": []}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "warm"):
                results[state].append(run(Path(folder), options.dtype, options.tokens))

    print(describe_machine("jax", "equigemma"))
    print(f"\nGemma 3 270M, {options.dtype}, {options.tokens} tokens; median (range)\n")
    print("| start | s to first token | tokens/s after it | peak memory, GB |\n|---|---|---|---|")
    for state, rows in results.items():
        cells = (
            f"{statistics.median(column):.2f} ({min(column):.2f}-{max(column):.2f})"
            for column in zip(*rows, strict=True)
        )
        print(f"| {state} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
