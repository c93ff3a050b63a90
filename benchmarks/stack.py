"""What does `eg.stack` save in compiling, and what does it cost in speed?

    python benchmarks/stack.py [--runs 3] [--timed 5] [--width 320] [--tokens 512]
        [--work forward step] [--layers 18 62] [--write]

The shape of Gemma 3 27B (five local layers to a global one, 62 layers) with width, heads and hidden
size cut down, and the same with fewer layers; random weights. `forward` is a call without a cache
in bfloat16, `step` a fine-tuning step with AdamW on float32 weights that computes in bfloat16, with
rematerialized layers. Plain and stacked take turns, each a process of its own, and must give the
same numbers, or there is no table.
"""

import time
from dataclasses import replace
from functools import partial

from processes import answer, by_turns, in_a_process
from report import Report, parser_of
from tables import column, ratios, spread, table


FORMS, WORK = ("plain", "stacked"), ("forward", "step")
VOCAB = 4096


def scaled(layers: int, width: int):
    """Gemma 3 27B, cut down; in the order of its layers nothing is changed."""
    import equigemma as eg
    from equigemma.config import FeedForwardConfig, OwnKVConfig

    whole = eg.variants.get("gemma3-27b")

    def smaller(layer):
        attention = replace(layer.attention, heads=4, kv=OwnKVConfig(heads=2), head_dim=64)
        return replace(layer, attention=attention, ffw=FeedForwardConfig(hidden_dim=4 * width))

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
        batch = next(train.pack([train.Example(ids, np.ones(tokens))], length=tokens, rows=1))
        optimizer = optax.adamw(1e-5)
        loss = partial(train.next_token_loss, compute_dtype="bfloat16", remat="nothing")
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


def main() -> None:
    parser = parser_of(__doc__, runs=3)
    parser.add_argument("--timed", type=int, default=5)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--layers", nargs="+", type=int, default=[18, 62])
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("width", "tokens", "timed")}
    sides = {f"{layers} {form}": (layers, form) for layers in options.layers for form in FORMS}
    fewest = min(options.layers)
    report = Report(options, "jax", "equigemma")

    for work in options.work:

        def run(side: str) -> dict:
            layers, form = sides[side]
            return in_a_process("stack.py", form=form, work=work, layers=layers, **sizes)

        rounds = by_turns(options.runs, sides, run)
        rows = []
        for side, (layers, form) in sides.items():
            plain, check = rounds[0][f"{layers} plain"]["check"], rounds[0][side]["check"]
            # Of bfloat16: means over many tokens agree better than each.
            if abs(plain - check) > 1e-2 * abs(plain):
                raise SystemExit(f"{work} of {layers} layers: plain gives {plain}, {form} {check}")
            compiling, running = (column(rounds, side, name) for name in ("compile", "run"))
            share = ratios(compiling, column(rounds, f"{fewest} stacked", "compile"))
            ratio = ratios(running, column(rounds, f"{layers} plain", "run"))
            rows.append([work, layers, form, *map(spread, (compiling, share, running, ratio))])
        against = f"against {fewest} stacked"
        head = ["", "layers", "form", "compile, s", against, "run, s", "stacked / plain"]
        report.say(table(head, rows))


if __name__ == "__main__":
    answer(measure)
    main()
