"""Measurements in processes of their own, by turns.

A script whose `measure(**arguments)` returns a dict calls `answer(measure)` before its `main()`;
then `in_a_process(script, **arguments)` starts it anew and has that dict.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path


ROOT = Path(__file__).parent.parent
_ONE = "--one"


def in_a_process(
    script: str,
    *,
    python: str | None = None,
    environment: dict[str, str] | None = None,
    **arguments,
) -> dict:
    """What `measure(**arguments)` of a script returns.

    **Raises:** `RuntimeError` with the end of what it complained about, if it failed.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TF_CPP_MIN_LOG_LEVEL": "3"}
    path = Path(__file__).parent / script
    ran = subprocess.run(
        [python or sys.executable, str(path), _ONE, json.dumps(arguments)],
        env=os.environ | variables | (environment or {}),
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise RuntimeError(f"{script} of {arguments} failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def answer(measure: Callable[..., dict]) -> None:
    """In a process that `in_a_process` started: measures, says what came, and ends it."""
    if sys.argv[1:2] == [_ONE]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))), flush=True)
        os._exit(0)  # llama.cpp's server would wait


def by_turns(runs: int, sides: Iterable[str], run: Callable[[str], dict]) -> list[dict[str, dict]]:
    """`run(side)` of each side, one after the other, `runs` times; tells how far it is."""
    sides, rounds = list(sides), []
    for turn in range(runs):
        found = {}
        for side in sides:
            started = time.perf_counter()
            found[side] = run(side)
            seconds = time.perf_counter() - started
            print(f"  {turn + 1}/{runs} {side}: {seconds:.0f} s", file=sys.stderr, flush=True)
        rounds.append(found)
    return rounds
