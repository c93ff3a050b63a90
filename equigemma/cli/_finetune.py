"""`equigemma finetune`: a model learns from a file of texts."""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equigemma.cli._curves import draw_curves
from equigemma.cli._settings import claim, sha256
from equigemma.cli._shared import keep_compiled_programs, load


if TYPE_CHECKING:
    from equigemma import train

Schedule = Literal["cosine", "linear", "constant"]
Stored = Literal["huggingface", "gguf", "orbax", "orbax-flat"]

SAMPLES, PROMPT_TOKENS, SAMPLE_TOKENS = 3, 16, 48


def finetune(
    model: Annotated[str, typer.Argument(help="Name of a model, a file, or a folder.")],
    data: Annotated[
        Path,
        typer.Argument(help="JSON lines of text, prompt and completion, or messages; or a text."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for everything that comes of it.")],
    lora: Annotated[
        int, typer.Option(help="Rank of adapters that learn in place of the weights; 0: none.")
    ] = 0,
    steps: Annotated[int, typer.Option(help="Updates; 0: as many as --epochs take.")] = 0,
    epochs: Annotated[int, typer.Option(help="How often to go through the data.")] = 1,
    learning_rate: Annotated[
        float, typer.Option(help="At its highest; 0: 2e-5, with adapters 2e-4.")
    ] = 0.0,
    schedule: Annotated[Schedule, typer.Option(help="How it falls after the warm-up.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps while it rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Longest gradient.")] = 1.0,
    length: Annotated[int, typer.Option(help="Tokens in a row; longer texts are cut.")] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a step, in rows.")] = 2048,
    micro_batches: Annotated[int, typer.Option(help="Parts of a step, to save memory.")] = 1,
    held_out: Annotated[float, typer.Option(help="Share of the data to test with.")] = 0.05,
    evaluate_every: Annotated[int, typer.Option(help="Steps; 0: a tenth of all.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Of order, split and adapters.")] = 0,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Of the computation.")
    ] = "bfloat16",
    stored: Annotated[
        Stored, typer.Option("--format", help="Of the weights in the end.")
    ] = "huggingface",
) -> None:
    """Fine-tune a model, as a whole or with adapters.

    The same command goes on where it was interrupted.
    """
    rows = _check(locals())
    console = Console(stderr=True, highlight=False)
    plan = _Plan(
        steps,
        learning_rate or (2e-4 if lora else 2e-5),
        schedule,
        warmup,
        weight_decay,
        clip,
        micro_batches,
    )
    from equigemma import train
    from equigemma.data import read

    if not data.is_file():
        raise ValueError(f"{data}: there is no such file to learn from.")
    train.check_writable(out)
    settings = {
        "model": model,
        "data": str(data),
        "data_sha256": sha256(data),
        "lora": lora,
        "length": length,
        "batch_tokens": batch_tokens,
        "held_out": held_out,
        "seed": seed,
        "epochs": epochs,
        "dtype": dtype,
    } | plan._asdict()
    for change in claim(out, settings):
        console.print(f"[yellow]{change}[/]")

    with train.Checkpoints(out / "checkpoints") as checkpoints:
        keep_compiled_programs()
        weights, tokenizer = load(model, "bfloat16" if lora else "float32")
        learned, tested = train.split(read(data, tokenizer), held_out, length=length, seed=seed)
        if not steps:
            options = {"length": length, "rows": rows, "seed": seed, "epochs": epochs}
            plan = plan._replace(steps=train.count_batches(learned, **options))
        saved, optimizer = _begin(weights, plan, lora, seed, checkpoints, out)
        del weights
        count = int(saved.state.step)
        done = f", {count} of them done before" if count else ""
        console.print(f"{len(learned)} pieces of text, {plan.steps} steps{done}")
        loss = partial(_loss, dtype)
        evaluate = train.make_evaluate(loss)
        tests = list(train.pack(tested, length, rows))

        with (
            train.MetricsFile(out / "metrics.jsonl", after=count) as metrics,
            _bar(console, plan.steps, count) as bar,
        ):
            task = bar.task_ids[0]
            every = evaluate_every or max(plan.steps // 10, 1)
            clock = time.perf_counter()

            def test(state: train.State, step: int) -> None:
                if tests:
                    value = evaluate(train.merge(state), iter(tests))
                    metrics.write(step, held_out_loss=value)
                    bar.update(task, held_out=f"held out {value:.4f}")

            def report(now: train.Report) -> None:
                nonlocal clock
                seconds = time.perf_counter() - clock
                metrics.write(
                    now.step,
                    loss=now.loss,
                    targets=now.weight,
                    gradient_norm=now.gradient_norm,
                    learning_rate=float(plan.rate(now.step - 1)),
                    seconds=seconds,
                )
                speed = f"{rows * length / seconds:,.0f} tokens/s"
                bar.update(task, completed=now.step, loss=f"loss {now.loss:.4f}", speed=speed)
                if now.step % every == 0 or now.step == plan.steps:
                    test(now.state, now.step)
                clock = time.perf_counter()

            if count == 0:
                test(saved.state, 0)
                clock = time.perf_counter()
            fitted = train.fit(
                train.make_step(loss, optimizer, clip=clip, micro_batches=micro_batches),
                saved.state,
                train.feed(learned, length=length, rows=rows, seed=seed, start=saved.place),
                steps=plan.steps,
                checkpoints=checkpoints,
                save_every=save_every,
                place=saved.place,
                report=report,
            )
    lines = train.read_metrics(out / "metrics.jsonl")
    if not draw_curves(lines, out / "curves.png"):
        console.print('[yellow]No curves.png: pip install "equigemma[notebooks]".[/]')
    if fitted.signal is not None:
        console.print(
            f"Stopped by {fitted.signal.name} after step {int(fitted.state.step)}, which is saved; "
            f"the same command goes on."
        )
        raise typer.Exit(128 + fitted.signal)
    _finish(fitted.state, tokenizer, lora, stored, tested or learned, out, console)
    tests_lines = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    if tests_lines:
        console.print(f"held-out loss: {tests_lines[0]:.4f} before, {tests_lines[-1]:.4f} now")


class _Plan(NamedTuple):
    """How weights change."""

    steps: int
    learning_rate: float
    schedule: Schedule
    warmup: float
    weight_decay: float
    clip: float
    micro_batches: int

    @property
    def rate(self) -> Any:
        """The learning rate as a function of the updates made."""
        import optax

        rising = round(self.warmup * self.steps)
        falling = max(self.steps - rising, 1)
        rest = {
            "cosine": lambda: optax.cosine_decay_schedule(self.learning_rate, falling),
            "linear": lambda: optax.linear_schedule(self.learning_rate, 0.0, falling),
            "constant": lambda: optax.constant_schedule(self.learning_rate),
        }[self.schedule]()
        # The first step learns too: the rise begins above 0.
        rise = optax.linear_schedule(
            self.learning_rate / (rising + 1), self.learning_rate, max(rising, 1)
        )
        return optax.join_schedules([rise, rest], [rising])

    @property
    def optimizer(self) -> Any:
        """AdamW at that rate."""
        import optax

        return optax.adamw(self.rate, weight_decay=self.weight_decay)


def _begin(
    weights: Any, plan: _Plan, lora: int, seed: int, checkpoints: Any, out: Path
) -> tuple["train.Saved", Any]:
    """The state that was saved last, or the first."""
    import equinox as eqx
    import jax

    from equigemma import lora as adapters
    from equigemma import train

    optimizer, trainable = plan.optimizer, eqx.is_inexact_array
    if lora:
        weights = adapters.add(weights, rank=lora, key=jax.random.key(seed))
        trainable = adapters.trainable(weights)
    trained, frozen = eqx.partition(weights, trainable)
    shapes = eqx.filter_eval_shape(train.init, trained, optimizer)
    like = train.State(shapes.model, frozen, shapes.optimizer, shapes.step)
    saved = checkpoints.restore(like)
    if saved is None:
        # The model is written in bfloat16.
        size = 2 * sum(leaf.size for leaf in jax.tree.leaves(weights))
        train.check_room(out, like, beside=size)
        first = train.init(weights, optimizer, trainable=trainable)
        saved = train.Saved(first, train.Place(), None)
    return saved, optimizer


def _loss(dtype: str, model: Any, batch: Any) -> Any:
    from equigemma import train

    return train.next_token_loss(model, batch, compute_dtype=dtype, checkpoint="inputs")


def _finish(
    state: Any, tokenizer: Any, lora: int, stored: Stored, examples: Any, out: Path, console: Any
) -> None:
    """Writes the weights, and what the model says now."""
    import jax
    import jax.numpy as jnp

    import equigemma as eg
    from equigemma import lora as adapters
    from equigemma import train

    model = train.merge(state)
    if lora:
        model = adapters.merge(model)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    path = out / ("model.gguf" if stored == "gguf" else "model")
    eg.save(model, path, tokenizer=tokenizer, format=stored)
    console.print(f"The model is in {path}.")

    with open(out / "samples.jsonl", "w", encoding="utf-8") as file:
        for example in examples[:SAMPLES]:
            prompt = _prompt(example)
            tokens = jnp.asarray(prompt, jnp.int32)
            options = {"max_new_tokens": SAMPLE_TOKENS, "stop": tokenizer.special.stop}
            row = eg.sampling.generate(model, tokens, **options).tokens
            begin, text = tokenizer.decode(prompt), tokenizer.decode(row[row >= 0])
            file.write(json.dumps({"prompt": begin, "text": text}) + "\n")
            console.print(f"[dim]{_escape(begin)}[/]{_escape(text)}\n")


def _prompt(example: Any) -> Sequence[int]:
    """What comes before the first learned token, or the beginning of what is learned as a whole."""
    given = next(at for at, weight in enumerate(example.weights[1:], 1) if weight)
    return example.tokens[: given if given > 1 else PROMPT_TOKENS]


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _bar(console: Console, steps: int, done: int) -> Progress:
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[held_out]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
    )
    bar.add_task("steps", total=steps, completed=done, loss="", held_out="", speed="")
    return bar


def _check(options: dict[str, Any]) -> int:
    """The number of rows of a batch, if the options make sense."""
    for name in ("lora", "steps", "evaluate_every", "learning_rate", "weight_decay", "seed"):
        _at_least(name, options[name], 0)
    for name in ("epochs", "micro_batches", "save_every"):
        _at_least(name, options[name], 1)
    _at_least("length", options["length"], 2)
    if options["clip"] <= 0:
        raise ValueError(f"--clip must be above 0, got {options['clip']}.")
    for name in ("warmup", "held_out"):
        if not 0 <= options[name] < 1:
            raise ValueError(f"{_option(name)} must be in [0, 1), got {options[name]}.")
    rows, rest = divmod(options["batch_tokens"], options["length"])
    if rest or not rows:
        raise ValueError(
            f"--batch-tokens must be a multiple of --length, got {options['batch_tokens']} and "
            f"{options['length']}."
        )
    if rows % options["micro_batches"]:
        raise ValueError(
            f"--micro-batches must divide the {rows} rows of a batch, got "
            f"{options['micro_batches']}."
        )
    return rows


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise ValueError(f"{_option(name)} must be at least {least}, got {value}.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
