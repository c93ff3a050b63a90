"""How fast is a fine-tuning step, and how much memory does it take, here and elsewhere?

    python benchmarks/training_step.py [--gemma-python PATH] [--pairs 7] [--timed 3]
        [--shapes 2x256 4x512] [--sides bf16 f32 lora qlora gemma transformers]

AdamW on all weights of the real Gemma 3 270M, of texts of Python's own source. Peers compute in
float32, their default for training: google-deepmind/gemma with optax, in the environment of
`tests/interop/requirements.txt` whose Python `--gemma-python` names, and transformers with torch.
Ours has float32 weights and moments too, and computes in bfloat16 (`bf16`) or in float32 (`f32`).
`lora` and `qlora` train adapters of rank 8 over weights of bfloat16 and of 8 bits; their first loss
is that of the whole model.

Each measurement is a process of its own; sides take turns, so that a machine's moods hit all alike.
The losses must agree, or there is no table. Needs the extras `demo` and
`parity`.
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np


RATE, WARM = 1e-5, 2
# Losses are about 3. Float32 sides differ by rounding.
TOLERANCE = {"f32": 1e-3, "gemma": 1e-3, "transformers": 1e-3}
# Whose losses the others must have: the first of these that runs.
REFERENCES = ("f32", "transformers", "gemma", "bf16")
# Before anything is learned bfloat16 differs by eight bits of each activation, and eight bits a
# little more. Later ones drift apart, perhaps by rounding in the gradients; and adapters learn
# something else. The last losses are in the table.
FIRST_ONLY = {"bf16": 0.03, "lora": 0.03, "qlora": 0.1}


def tokens_of(rows: int, length: int, tokenizer) -> np.ndarray:
    """Text that every Python has: its own source."""
    ids = tokenizer.encode(inspect.getsource(argparse), bos=False)
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length)


def measure(step, wait, timed: int) -> dict:
    """Losses of all steps, and seconds of those after the first ones."""
    losses, seconds = [], []
    for _ in range(WARM + timed):
        started = time.perf_counter()
        losses.append(wait(step()))
        seconds.append(time.perf_counter() - started)
    # From the kernel: resource.getrusage also counts what the parent had before it started this.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {"losses": losses, "seconds": seconds[WARM:], "gigabytes": peak * 1024 / 1e9}


def ours(dtype: str, rows: int, length: int, timed: int) -> dict:
    import optax

    import equigemma as eg
    from equigemma import train

    model, tokenizer = eg.load("gemma3-270m", dtype="float32")
    texts = [train.Example(row, np.ones(length)) for row in tokens_of(rows, length, tokenizer)]
    batch = next(train.pack(texts, length, rows))
    optimizer = optax.adamw(RATE)
    loss = partial(train.next_token_loss, compute_dtype=dtype, checkpoint="inputs")
    update = train.make_step(loss, optimizer)
    state = train.init(model, optimizer)
    del model

    def step():
        nonlocal state
        state, metrics = update(state, batch)
        return metrics.loss

    return measure(step, float, timed)


def adapters(eight_bit: bool, rows: int, length: int, timed: int) -> dict:
    import jax
    import optax

    import equigemma as eg
    from equigemma import lora, quantize, train

    model, tokenizer = eg.load("gemma3-270m", dtype="bfloat16")
    texts = [train.Example(row, np.ones(length)) for row in tokens_of(rows, length, tokenizer)]
    batch = next(train.pack(texts, length, rows))
    model = lora.add(model, rank=8, key=jax.random.key(0))
    if eight_bit:
        model = quantize.int8(model)
    optimizer = optax.adamw(RATE)
    loss = partial(train.next_token_loss, compute_dtype="bfloat16", checkpoint="inputs")
    update = train.make_step(loss, optimizer)
    state = train.init(model, optimizer, trainable=lora.trainable(model))
    del model

    def step():
        nonlocal state
        state, metrics = update(state, batch)
        return metrics.loss

    return measure(step, float, timed)


def gemma(rows: int, length: int, timed: int) -> dict:
    import jax
    import jax.numpy as jnp
    import optax

    import equigemma as eg
    from equigemma import linen

    model, tokenizer = eg.load("gemma3-270m", dtype="float32")
    tokens = jnp.asarray(tokens_of(rows, length, tokenizer))
    params = linen.to_variables(model)["params"]
    del model
    from gemma import gm

    module = gm.nn.Gemma3_270M(dtype=jnp.float32)
    optimizer = optax.adamw(RATE)
    state = optimizer.init(params)

    def loss(params):
        logits = module.apply({"params": params}, tokens).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    def step():
        nonlocal params, state
        params, state, value = update(params, state)
        return value

    return measure(step, float, timed)


def transformers(rows: int, length: int, timed: int) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    import equigemma as eg

    model, tokenizer = eg.load("gemma3-270m", dtype="float32")
    tokens = torch.tensor(tokens_of(rows, length, tokenizer)).long()
    with tempfile.TemporaryDirectory() as folder:
        eg.save(model, Path(folder) / "model", tokenizer=tokenizer)
        del model
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=RATE, weight_decay=1e-4)

    def step():
        optimizer.zero_grad()
        loss = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss

    return measure(step, lambda loss: loss.item(), timed)


SIDES = {
    "bf16": partial(ours, "bfloat16"),
    "f32": partial(ours, "float32"),
    "lora": partial(adapters, False),
    "qlora": partial(adapters, True),
    "gemma": gemma,
    "transformers": transformers,
}


def run(python: str, side: str, rows: int, length: int, timed: int) -> dict:
    command = [python, __file__, "--side", side, "--shapes", f"{rows}x{length}"]
    command += ["--timed", str(timed)]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{side} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def agree(results: dict[str, dict]) -> None:
    reference = next(results[side] for side in REFERENCES if side in results)["losses"]
    for side, result in results.items():
        differences = np.abs(np.subtract(result["losses"], reference))
        difference = differences[0] if side in FIRST_ONLY else differences.max()
        if not difference < (TOLERANCE | FIRST_ONLY)[side]:
            sys.exit(f"Losses of {side} differ by {difference}: {result['losses']}, {reference}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", default=["2x256", "4x512"])
    parser.add_argument("--timed", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--gemma-python")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    if options.side:
        print(json.dumps(SIDES[options.side](*shapes[0], options.timed)))
        return

    from machine import describe_machine

    pythons = {side: sys.executable for side in options.sides}
    if "gemma" in pythons:
        if options.gemma_python is None:
            parser.error("the side gemma needs --gemma-python")
        pythons["gemma"] = options.gemma_python
    print(describe_machine("jax", "equigemma", "torch", "transformers"))
    for rows, length in shapes:
        rounds = []
        for _ in range(options.pairs):
            results = {
                side: run(python, side, rows, length, options.timed)
                for side, python in pythons.items()
            }
            print(json.dumps(results), file=sys.stderr)
            agree(results)
            rounds.append(results)
        print(f"\n{rows} x {length} tokens, {options.pairs} rounds; median (range)\n")
        print("| side | tokens/s | peak memory, GB | speed of bf16 | its memory | last loss |")
        print("|---|---|---|---|---|---|")
        for side in pythons:
            speeds = [rows * length / statistics.median(r[side]["seconds"]) for r in rounds]
            best = [rows * length / statistics.median(r["bf16"]["seconds"]) for r in rounds]
            peaks = [r[side]["gigabytes"] for r in rounds]
            ratios = [one / other for one, other in zip(best, speeds, strict=True)]
            shares = [r["bf16"]["gigabytes"] / r[side]["gigabytes"] for r in rounds]
            losses = [r[side]["losses"][-1] for r in rounds]
            cells = map(_cell, (speeds, peaks, ratios, shares, losses))
            print(f"| {side} | {' | '.join(cells)} |")


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
