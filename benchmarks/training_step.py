"""How fast is a fine-tuning step, and how much memory does it take, here and elsewhere?

    python benchmarks/training_step.py [--gemma-python PATH] [--other-python PATH] [--runs 7]
        [--timed 3]
        [--shapes 2x256 4x512] [--sides bf16 f32 lora qlora gemma transformers] [--write]

AdamW on all weights of the real Gemma 3 270M, of texts of Python's own source. Peers compute in
float32, their default for training: google-deepmind/gemma with optax, in the environment of
`tests/interop/requirements.txt` whose Python `--gemma-python` names, and transformers with torch.
Ours has float32 weights and moments too, and computes in bfloat16 (`bf16`) or in float32 (`f32`).
`lora` and `qlora` train adapters of rank 8 over weights of bfloat16 and of 8 bits; their first loss
is that of the whole model.

Each measurement is a process of its own; sides take turns, so that a machine's moods hit all alike.
The losses of the first round must agree, or there is no table. Needs the extras `demo` and
`parity`.
"""

import argparse
import inspect
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from machine import peak_memory
from peers import OTHER, PACKAGES, add_sides, installed, python_of
from processes import answer, by_turns, in_a_process
from report import parser_of
from tables import column, ratios, spread, table


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


def timed_steps(step, wait, timed: int) -> dict:
    """Losses of all steps, and seconds of those after the first ones."""
    losses, seconds = [], []
    for _ in range(WARM + timed):
        started = time.perf_counter()
        losses.append(wait(step()))
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "seconds": seconds[WARM:], "gigabytes": peak_memory()}


def ours(dtype: str, rows: int, length: int, timed: int) -> dict:
    import optax

    import equigemma as eg
    from equigemma import train

    model, tokenizer = eg.load("gemma3-270m", dtype="float32")
    texts = [train.Example(row, np.ones(length)) for row in tokens_of(rows, length, tokenizer)]
    batch = next(train.pack(texts, length=length, rows=rows))
    optimizer = optax.adamw(RATE)
    loss = partial(train.next_token_loss, compute_dtype=dtype, remat="nothing")
    update = train.make_step(loss, optimizer)
    state = train.init(model, optimizer)
    del model

    def step():
        nonlocal state
        state, metrics = update(state, batch)
        return metrics.loss

    return timed_steps(step, float, timed)


def adapters(eight_bit: bool, rows: int, length: int, timed: int) -> dict:
    import jax
    import optax

    import equigemma as eg
    from equigemma import lora, quantize, train

    model, tokenizer = eg.load("gemma3-270m", dtype="bfloat16")
    texts = [train.Example(row, np.ones(length)) for row in tokens_of(rows, length, tokenizer)]
    batch = next(train.pack(texts, length=length, rows=rows))
    model = lora.add(model, rank=8, key=jax.random.key(0))
    if eight_bit:
        model = quantize.int8(model)
    optimizer = optax.adamw(RATE)
    loss = partial(train.next_token_loss, compute_dtype="bfloat16", remat="nothing")
    update = train.make_step(loss, optimizer)
    state = train.init(model, optimizer, trainable=lora.trainable(model))
    del model

    def step():
        nonlocal state
        state, metrics = update(state, batch)
        return metrics.loss

    return timed_steps(step, float, timed)


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

    return timed_steps(step, float, timed)


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

    return timed_steps(step, lambda loss: loss.item(), timed)


SIDES = {
    "bf16": partial(ours, "bfloat16"),
    "f32": partial(ours, "float32"),
    "lora": partial(adapters, False),
    "qlora": partial(adapters, True),
    "gemma": gemma,
    "transformers": transformers,
}


def measure(side: str, rows: int, length: int, timed: int) -> dict:
    return SIDES[side.removesuffix(OTHER)](rows, length, timed)


def agree(results: dict[str, dict]) -> None:
    reference = next(results[side] for side in REFERENCES if side in results)["losses"]
    for side, result in results.items():
        differences = np.abs(np.subtract(result["losses"], reference))
        difference = differences[0] if side.removesuffix(OTHER) in FIRST_ONLY else differences.max()
        if not difference < (TOLERANCE | FIRST_ONLY)[side.removesuffix(OTHER)]:
            raise SystemExit(
                f"Losses of {side} differ by {difference}: {result['losses']}, {reference}"
            )


def main() -> None:
    parser = parser_of(__doc__, runs=7)
    parser.add_argument("--shapes", nargs="+", default=["2x256", "4x512"])
    parser.add_argument("--timed", type=int, default=3)
    add_sides(parser, SIDES)
    options = parser.parse_args()
    sides, report = installed(options, *PACKAGES[:-1])
    best = sides[0]

    for rows, length in (map(int, shape.split("x")) for shape in options.shapes):

        def run(side: str) -> dict:
            sizes = {"rows": rows, "length": length, "timed": options.timed}
            return in_a_process(
                "training_step.py", python=python_of(side, options), side=side, **sizes
            )

        rounds = by_turns(1, sides, run)
        agree(rounds[0])
        rounds += by_turns(options.runs - 1, sides, run)

        def row(side: str) -> list[str]:
            seconds, bests = (
                column(rounds, each, lambda found: statistics.median(found["seconds"]))
                for each in (side, best)
            )
            peaks, lowest = (column(rounds, each, "gigabytes") for each in (side, best))
            figures = [
                [rows * length / each for each in seconds],
                peaks,
                ratios(seconds, bests),
                ratios(lowest, peaks),
            ]
            losses = " ".join(f"{loss:.3f}" for loss in rounds[0][side]["losses"])
            return [side, *map(spread, figures), losses]

        report.say(f"{rows} x {length} tokens.\n")
        head = ["side", "tokens/s", "peak memory, GB", f"speed of {best}", "its memory"]
        report.say(table([*head, "losses of the first round"], map(row, sides)))


if __name__ == "__main__":
    answer(measure)
    main()
