"""What does `eg.stack` save in compiling, and what does it cost in speed?

    python benchmarks/stack.py [--runs 3] [--timed 5] [--width 320] [--tokens 512]

The shape of Gemma 3 27B (five local layers to a global one, 62 layers) with width, heads and hidden
size cut down, and the same with 18 layers; random weights. `forward` is a call without a cache in
bfloat16, `step` a fine-tuning step with AdamW on float32 weights that computes in bfloat16, with
checkpointed layers. Plain and stacked take turns, each a process of its own, and must give the same
numbers, or there is no table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path


FORMS, WORK, DEPTHS = ("plain", "stacked"), ("forward", "step"), (18, 62)
VOCAB = 4096


def scaled(layers: int, width: int):
    """Gemma 3 27B, cut down; in the order of its layers nothing is changed."""
    import equigemma as eg
    from equigemma.config import Dense, OwnKV

    whole = eg.variants.get("gemma3-27b")

    def smaller(layer):
        attention = replace(layer.attention, heads=4, kv=OwnKV(heads=2), head_dim=64)
        return replace(layer, attention=attention, ffw=Dense(hidden=4 * width))

    chosen = tuple(smaller(layer) for layer in whole.layers[:layers])
    return replace(whole, vocab=VOCAB, width=width, layers=chosen, vision=None)


def measure(form: str, work: str, layers: int, width: int, tokens: int, timed: int) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import equigemma as eg
    from equigemma import train

    dtype = jnp.bfloat16 if work == "forward" else jnp.float32
    model = eg.Transformer(scaled(layers, width), key=jax.random.key(0), dtype=dtype)
    if form == "stacked":
        model = eg.stack(model)
    ids = np.random.default_rng(0).integers(0, VOCAB, tokens)

    started = time.perf_counter()
    if work == "forward":
        arguments = model, jnp.asarray(ids, jnp.int32)
        compiled = jax.jit(lambda model, ids: model(ids).logits).lower(*arguments).compile()
        compiling = time.perf_counter() - started
        check = float(jnp.mean(jax.nn.log_softmax(compiled(*arguments), axis=-1)[:, 7]))

        def call():
            jax.block_until_ready(compiled(*arguments))
    else:
        batch = next(train.pack([train.Example(ids, np.ones(tokens))], tokens, 1))
        optimizer = optax.adamw(1e-5)
        loss = partial(train.next_token_loss, compute_dtype="bfloat16", checkpoint="inputs")
        step = train.make_step(loss, optimizer)
        state, metrics = step(train.init(model, optimizer), batch)
        check = float(metrics.loss)
        compiling = time.perf_counter() - started

        def call():
            nonlocal state
            state, metrics = step(state, batch)
            float(metrics.loss)

    seconds = []
    for _ in range(timed):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    run = min(seconds)
    if work == "step":
        compiling -= run  # the first step was in it
    return {"compile": compiling, "run": run, "check": check}


def in_a_process(form: str, work: str, layers: int, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--one", form, work, str(layers)]
    command += ["--width", str(options.width), "--tokens", str(options.tokens)]
    command += ["--timed", str(options.timed)]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{form} failed:\n{result.stderr[-2000:]}")
    found = json.loads(result.stdout.splitlines()[-1])
    print(form, work, layers, found, file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--timed", type=int, default=5)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        form, work, layers = options.one
        shape = (options.width, options.tokens, options.timed)
        print(json.dumps(measure(form, work, int(layers), *shape)))
        return

    from machine import describe_machine

    print(describe_machine("jax", "equigemma"))
    print("\n| | layers | form | compile, s | against 18 stacked | run, s | stacked / plain |")
    print("|---|---|---|---|---|---|---|")
    for work in options.work:
        rounds = [
            {
                (layers, form): in_a_process(form, work, layers, options)
                for layers in DEPTHS
                for form in FORMS
            }
            for _ in range(options.runs)
        ]
        for layers in DEPTHS:
            plain, stacked = (rounds[0][layers, form]["check"] for form in FORMS)
            # Of bfloat16: means over many tokens agree better than each.
            if abs(plain - stacked) > 1e-2 * abs(plain):
                sys.exit(f"{work} of {layers} layers: plain gives {plain}, stacked {stacked}")
        for layers in DEPTHS:
            for form in FORMS:
                mine = [r[layers, form] for r in rounds]
                compiling = [one["compile"] for one in mine]
                share = [r[layers, form]["compile"] / r[18, "stacked"]["compile"] for r in rounds]
                ratio = [r[layers, form]["run"] / r[layers, "plain"]["run"] for r in rounds]
                cells = map(_cell, (compiling, share, [one["run"] for one in mine], ratio))
                print(f"| {work} | {layers} | {form} | {' | '.join(cells)} |")


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


if __name__ == "__main__":
    main()
