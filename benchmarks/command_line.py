"""How long from `equigemma generate` to the first token, and how fast is it from there on?

    python benchmarks/command_line.py [--runs 5] [--tokens 64] [--dtype bfloat16]
        [--other-python PATH] [--before PATH] [--write]

Every run is a process of its own. Cold: no compiled program is kept from before (the weights file
has been put together, the operating system has it cached, and Python has kept its byte code, as pip
does). Warm: a second start. After both, in each round, the bare loop as `decode.py` measures it,
behind a prompt as short. `--before` names a checkout of an earlier commit, which takes turns with
this one; then the last table has the ratios of pairs. `--other-python` names the Python of an
environment with another version of JAX, which takes turns too. Needs the extra `demo`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from decode import runner
from files import MODEL, files_for
from machine import versions_there
from peers import OTHER, add_other
from processes import ROOT
from report import Report, parser_of
from tables import column, ratios, spread, table


PROMPT, PROMPT_TOKENS = "The capital of France is", 6
BEFORE = ", before"
FIGURES = ("s to first token", "s to last token", "tokens/s", "peak memory, GB")


def run(
    cache: Path, dtype: str, tokens: int, package: Path = ROOT, python: str = sys.executable
) -> dict[str, float]:
    """The figures of one start. `package`: the checkout that is started."""
    command = [python, "-c", "from equigemma.cli import main; main()", "generate", PROMPT]
    command += ["--max-new-tokens", str(tokens), "--dtype", dtype]
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment() | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(package)},
        cwd=cache,
    )
    assert process.stdout is not None and process.stderr is not None
    descriptor, seen, times = process.stdout.fileno(), 0, []
    while piece := os.read(descriptor, 4096):
        seen += len(piece)
        if seen > len(PROMPT):
            times.append(time.perf_counter())
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"The command failed with status {status}:\n{said}")
    if not re.search(rf"\b{tokens} tokens", said):
        raise RuntimeError(f"The text ended before {tokens} tokens; ask for fewer: {said}")
    # The line's end comes after the last token. The second program may be compiled after the first
    # token, so speed is that from the second one on.
    first, second, *_, last = times
    speed = (tokens - 2) / (last - second)
    figures = (first - started, last - started, speed, usage.ru_maxrss / 1e6)
    return dict(zip(FIGURES, figures, strict=True))


def _environment() -> dict[str, str]:
    """That of this process, with byte code in a folder that stays from run to run."""
    there = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return there | {"PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "equigemma-bytecode")}


def starts(options: argparse.Namespace, package: Path, python: str, suffix: str = "") -> dict:
    """A cold one and a warm one."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            state + suffix: run(Path(folder), options.dtype, options.tokens, package, python)
            for state in ("cold", "warm")
        }


def main() -> None:
    parser = parser_of(__doc__, runs=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--before", type=Path, metavar="PATH", help="a checkout of an earlier commit, by turns"
    )
    add_other(parser)
    options = parser.parse_args()
    sides, versions = [(ROOT, sys.executable, "")], ""
    if options.before:
        sides.append((options.before, sys.executable, BEFORE))
    if other := options.other_python:
        sides.append((ROOT, other, OTHER))
        versions = f"other: {versions_there(other, 'jax', 'jaxlib')}"
    report = Report(options, "jax", "equigemma", versions=versions)

    for package, python, _ in sides:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), options.dtype, 4, package, python)  # writes byte code
    rounds = []
    with files_for(["ours"]) as (files, _):
        bare = runner(files, options)
        for _ in range(options.runs):
            found = {}
            for side in sides:
                found |= starts(options, *side)
            seconds = bare("ours", PROMPT_TOKENS, options.tokens, options.dtype)["seconds"]
            bare_loop = {"bare loop": {FIGURES[2]: 1 / seconds}}
            rounds.append(found | bare_loop)

    report.say(f"{MODEL}, {options.dtype}, {options.tokens} tokens.\n")
    loop = column(rounds, "bare loop", FIGURES[2])
    rows = []
    for state in [each for each in rounds[0] if each != "bare loop"]:
        first, last, speed, memory = (column(rounds, state, figure) for figure in FIGURES)
        rows.append([state, *map(spread, (first, last, speed, ratios(speed, loop), memory))])
    rows.append(["bare loop", "-", "-", spread(loop), "1", "-"])
    report.say(table(["start", *FIGURES[:3], "of the bare loop", FIGURES[3]], rows))
    if options.before is None:
        return
    rows = []
    for state in ("cold", "warm"):
        pairs = (
            ratios(column(rounds, state, figure), column(rounds, state + BEFORE, figure))
            for figure in FIGURES
        )
        rows.append([state, *map(spread, pairs)])
    report.say(table(["now / before, in pairs", *FIGURES], rows))


if __name__ == "__main__":
    main()
