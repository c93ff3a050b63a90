"""How long until a prompt is read, here and elsewhere, and how much memory does a long one take?

    python benchmarks/prefill.py [--runs 7] [--lengths 512 4096] [--sides ours transformers llama]
    python benchmarks/prefill.py --memory 32768

Prompts are the source of Python's own modules, one row; a figure is tokens of the prompt by the
time to the first new token, greedy, after compiling. `ours` and `transformers` have the real Gemma
3 270M in bfloat16, `ours` prepared; `llama` is llama.cpp (`xllamacpp`) on the file of the extra
`demo` as it is, weights of 4 to 8 bits: fewer bytes, other arithmetic. Every run is a process of
its own, sides by turns. Before any time is taken, ours and transformers must give the same next
token in float32. With `--memory` the peak of one process of ours that reads so many tokens.
"""

import argparse
import ast
import inspect
import json
import os
import pydoc
import statistics
import subprocess
import sys
import tempfile
import time
import typing
import urllib.request
from collections.abc import Callable
from pathlib import Path


MODEL = "gemma3-270m"
TIMED = 3


def prompt(tokenizer, length: int) -> list[int]:
    """Text that every Python has, and more than enough of it."""
    text = "".join(map(inspect.getsource, (argparse, inspect, typing, pydoc, ast)))
    ids = [2, *tokenizer.encode(text, bos=False)][:length]
    assert len(ids) == length, f"there are only {len(ids)} tokens of text"
    return ids


def fastest(read: Callable[[], int]) -> dict:
    """The next token, and the seconds of the fastest of a few readings after the first."""
    seconds, token = [], -1
    for _ in range(1 + TIMED):
        started = time.perf_counter()
        token = read()
        seconds.append(time.perf_counter() - started)
    return {"token": token, "seconds": min(seconds[1:]), "first": seconds[0]}


def ours(length: int, dtype: str) -> dict:
    import jax.numpy as jnp

    import equigemma as eg

    model, tokenizer = eg.load(MODEL, dtype=dtype)
    tokens, model = jnp.asarray(prompt(tokenizer, length)), eg.prepare(model)
    generate = eg.sampling.generate
    return fastest(lambda: int(generate(model, tokens, max_new_tokens=1).tokens[0]))


def transformers(length: int, dtype: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    import equigemma as eg

    model, tokenizer = eg.load(MODEL, dtype=dtype)
    ids = torch.tensor([prompt(tokenizer, length)])
    with tempfile.TemporaryDirectory() as folder:
        eg.save(model, Path(folder) / "model", tokenizer=tokenizer)
        del model
        theirs = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=getattr(torch, dtype)
        ).eval()

    def read() -> int:
        with torch.inference_mode():
            return int(theirs(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    return fastest(read)


def llama(length: int, dtype: str) -> dict:
    del dtype  # that of the file
    import xllamacpp

    import equigemma as eg
    from equigemma.checkpoint._embedded import embedded_file

    path, (_, tokenizer) = embedded_file(MODEL), eg.load(MODEL)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = length + 64, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.fit_params, params.cache_ram_mib, params.verbosity, params.port = False, 0, 0, 0
    server = xllamacpp.Server(params)
    body = {
        "prompt": prompt(tokenizer, length),
        "n_predict": 1,
        "temperature": 0,
        "cache_prompt": False,
        "return_tokens": True,
    }
    request = urllib.request.Request(
        f"{server.listening_address}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )

    def read() -> int:
        answer = json.load(urllib.request.urlopen(request))
        assert answer["timings"]["prompt_n"] == length
        return answer["tokens"][0]

    return fastest(read)


SIDES = {"ours": ours, "transformers": transformers, "llama": llama}


def memory(length: int) -> dict:
    """Gigabytes of the process: with the model in memory, and at most while it reads."""
    import jax.numpy as jnp

    import equigemma as eg

    model, tokenizer = eg.load(MODEL, dtype="bfloat16")
    tokens = jnp.asarray(prompt(tokenizer, length))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    started = time.perf_counter()
    eg.sampling.generate(model, tokens, max_new_tokens=1).tokens.block_until_ready()
    seconds = time.perf_counter() - started
    return {"before": before, "peak": _status("VmHWM"), "seconds": seconds}


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


def run(side: str, length: int, dtype: str = "bfloat16") -> dict:
    command = [sys.executable, __file__, "--one", side, "--dtype", dtype, "--lengths", str(length)]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{side} failed:\n{result.stderr[-2000:]}")
    found = json.loads(result.stdout.splitlines()[-1])
    print(side, length, dtype, found, file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--memory", type=int, nargs="+", default=[])
    parser.add_argument("--unchecked", action="store_true", help="the tokens were compared before")
    parser.add_argument("--one", choices=[*SIDES, "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        (length,) = options.lengths
        measured = SIDES[options.one](length, options.dtype) if options.one in SIDES else None
        print(json.dumps(measured or memory(length)), flush=True)
        os._exit(0)  # llama.cpp's server would wait

    from machine import describe_machine

    print(describe_machine("jax", "equigemma", "torch", "transformers", "xllamacpp"))
    if options.memory:
        print("\n| tokens | model in memory, GB | peak while reading, GB | s, with compiling |")
        print("|---|---|---|---|")
        for length in options.memory:
            found = run("memory", length)
            cells = (found["before"], found["peak"], found["seconds"])
            print(f"| {length:,} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
        return
    if {"ours", "transformers"} <= set(options.sides) and not options.unchecked:
        for length in options.lengths:
            exact = {
                side: run(side, length, "float32")["token"] for side in SIDES if side != "llama"
            }
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
            cells = f"{_cell(speeds)} | {_cell(ratios)} | {_cell(first)} | {tokens}"
            print(f"| {length:,} | {side} | {cells} |")


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


if __name__ == "__main__":
    main()
