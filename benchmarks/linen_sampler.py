"""How fast is our model in DeepMind's own sampling loop, against their model on the same weights?

    python benchmarks/linen_sampler.py [--runs 7] [--dtype bfloat16] [--prompt 256] [--new 128]

Runs in the environment of `tests/interop/requirements.txt`. Every run is a process of its own,
theirs and ours by turns. Decoding is `gm.text.Sampler` with N new tokens against 1 new token, the
faster of two runs each, after compiling; prefill is a compiled `apply` on the prompt through an
empty cache; greedy, no token stops. Before any time is taken, both models must give the same tokens
in float32.
"""

import argparse
import enum
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe_machine
from tables import spread


MODELS = ("theirs", "ours")
FIGURES = ("decode, ms/token", "prefill, s", "compile, s")


def sampler(which: str, dtype: str, ids: list[int], new: int) -> tuple[Any, Any, Any]:
    """DeepMind's sampler of a prompt around one of the models, the model, and its parameters."""
    import equigemma as eg
    from equigemma import linen

    equinox_model, _ = eg.load("gemma3-270m", dtype=dtype)
    params = linen.to_variables(equinox_model)["params"]

    from gemma import gm

    package = gm.nn if which == "theirs" else linen
    model = package.Gemma3_270M(dtype=dtype)

    class Ids:
        """Token ids in place of text, so that both models get the same ones."""

        VERSION = 3
        FORBIDDEN_TOKENS = ()

        class special_tokens(enum.IntEnum):
            PAD, EOS, BOS, END_OF_TURN = 0, -1, 2, -2

        def encode(self, text, *, add_bos=False, add_eos=False):
            return ids

        def decode(self, ids):
            return ""

    made = gm.text.Sampler(
        model=model,
        params=params,
        tokenizer=Ids(),
        cache_length=len(ids) + new + 8,
        max_out_length=new,
        pad_length=len(ids),
    )
    return made, model, params


def measure(which: str, dtype: str, prompt: int, new: int) -> dict[str, Any]:
    """The figures of one process, and the tokens that came out."""
    import jax
    import jax.numpy as jnp

    ids = [2, *(5 + 7919 * i % 200_000 for i in range(prompt - 1))]
    made, model, params = sampler(which, dtype, ids, new)

    def sample(count: int) -> tuple[float, Any]:
        started = time.perf_counter()
        output = made.sample("", max_new_tokens=count, return_state=True)
        jax.block_until_ready(output.state.predicted_tokens)
        return time.perf_counter() - started, output.state.predicted_tokens

    first, _ = sample(1)
    short = min(sample(1)[0] for _ in range(2))
    long, tokens = min((sample(new) for _ in range(2)), key=lambda timed: timed[0])

    cache = model.init_cache(
        batch_size=1, dtype=params["final_norm"]["scale"].dtype, cache_length=prompt
    )
    inputs = {
        "tokens": jnp.asarray([ids]),
        "cache": cache,
        "positions": jnp.arange(prompt)[None],
        "attention_mask": jnp.tril(jnp.ones((1, prompt, prompt), bool)),
    }

    @jax.jit
    def whole_prompt(params, inputs):
        return model.apply({"params": params}, **inputs, return_last_only=True).logits

    def prefill() -> float:
        started = time.perf_counter()
        jax.block_until_ready(whole_prompt(params, inputs))
        return time.perf_counter() - started

    prefill()
    return {
        "decode, ms/token": 1e3 * (long - short) / (new - 1),
        "prefill, s": min(prefill() for _ in range(3)),
        "compile, s": first - short,
        "tokens": tokens[0].tolist(),
    }


def in_a_process(which: str, options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--one", which, "--dtype", dtype]
    command += ["--prompt", str(options.prompt), "--new", str(options.new)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{which} failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.dtype, options.prompt, options.new)))
        return

    exact = [in_a_process(which, options, "float32")["tokens"] for which in MODELS]
    if exact[0] != exact[1]:
        raise SystemExit(f"The tokens differ in float32:\n{exact[0]}\n{exact[1]}")

    runs: dict[str, list[dict[str, Any]]] = {which: [] for which in MODELS}
    for _ in range(options.runs):
        for which in MODELS:
            runs[which].append(in_a_process(which, options, options.dtype))
            figures = {figure: round(runs[which][-1][figure], 3) for figure in FIGURES}
            print(which, json.dumps(figures), file=sys.stderr, flush=True)

    print(describe_machine("jax", "gemma", "equigemma"))
    print(
        f"\nGemma 3 270M, {options.dtype}, gm.text.Sampler, prompt {options.prompt}, "
        f"{options.new} new tokens, {options.runs} interleaved runs; median (range)\n"
    )
    print("| | theirs | ours | theirs / ours, in pairs |\n|---|---|---|---|")
    for figure in FIGURES:
        columns = [[run[figure] for run in runs[which]] for which in MODELS]
        ratios = [theirs / ours for theirs, ours in zip(*columns, strict=True)]
        print(f"| {figure} | {' | '.join(spread(column) for column in (*columns, ratios))} |")


if __name__ == "__main__":
    main()
