"""`equigemma finetune`: a model learns from a file of texts."""

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equigemma.cli._curves import draw_curves
from equigemma.cli._settings import claim, sha256
from equigemma.cli._shared import keep_compiled_programs, load
from equigemma.cli._tuning import (
    Adapting,
    Kind,
    Plan,
    Schedule,
    Stored,
    StoredDType,
    begin,
    escape,
    loss,
    path_of,
    whole,
    write_adapters,
    write_samples,
)


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
    lora_kind: Annotated[Kind, typer.Option(help="Of adapters.")] = "lora",
    eight_bit: Annotated[
        bool, typer.Option("--eight-bit", help="Weights below adapters are held in 8 bits.")
    ] = False,
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
        Stored, typer.Option("--format", "-f", help="Of the weights in the end.")
    ] = "huggingface",
    stored_dtype: Annotated[
        StoredDType, typer.Option(help="Of the weights in the end; q8_0: with gguf only.")
    ] = "bfloat16",
) -> None:
    """Fine-tune a model, as a whole or with adapters.

    The same command goes on where it was interrupted.
    """
    rows = _check(locals())
    console = Console(stderr=True, highlight=False)
    plan = Plan(
        steps,
        learning_rate or (2e-4 if lora else 2e-5),
        schedule,
        warmup,
        weight_decay,
        clip,
        micro_batches,
    )
    adapting = Adapting(lora, lora_kind, eight_bit, seed)
    from equigemma import save, train
    from equigemma.checkpoint._save import plan_save
    from equigemma.data import read

    if not data.is_file():
        raise ValueError(f"{data}: there is no such file to learn from.")
    train.check_writable(out)
    settings = {
        "model": model,
        "data": str(data),
        "data_sha256": sha256(data),
        "lora": lora,
        "lora_kind": lora_kind,
        "eight_bit": eight_bit,
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
        # What cannot be saved is said now.
        plan_save(path_of(stored, out), tokenizer, format=stored, dtype=stored_dtype)
        learned, tested = train.split(read(data, tokenizer), held_out, length=length, seed=seed)
        if not steps:
            options = {"length": length, "rows": rows, "seed": seed, "epochs": epochs}
            plan = plan._replace(steps=train.count_batches(learned, **options))
        prompts = tested or learned
        if not (out / "samples.jsonl").exists():
            write_samples(weights, tokenizer, 0, prompts, out, console)
        saved, optimizer = begin(weights, plan, adapting, checkpoints, out)
        del weights
        count = int(saved.state.step)
        done = f", {count} of them done before" if count else ""
        console.print(f"{len(learned)} pieces of text, {plan.steps} steps{done}")
        objective = partial(loss, dtype)
        evaluate = train.make_evaluate(objective)
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
                train.make_step(objective, optimizer, clip=clip, micro_batches=micro_batches),
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
        hint = escape('pip install "equigemma[finetune]"')
        console.print(f"[yellow]No curves.png: matplotlib is not installed: {hint}.[/]")
    if fitted.signal is not None:
        console.print(
            f"Stopped by {fitted.signal.name} after step {int(fitted.state.step)}, which is saved; "
            f"the same command goes on."
        )
        raise typer.Exit(128 + fitted.signal)
    tuned = train.merge(fitted.state)
    if lora:
        write_adapters(tuned, model, out, console)
    tuned = whole(tuned, model, adapting)
    path = path_of(stored, out)
    save(tuned, path, tokenizer=tokenizer, format=stored, dtype=stored_dtype)
    console.print(f"The model is in {path}.")
    write_samples(tuned, tokenizer, plan.steps, prompts, out, console)
    tests_lines = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    if tests_lines:
        console.print(f"held-out loss: {tests_lines[0]:.4f} before, {tests_lines[-1]:.4f} now")


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
    if options["eight_bit"] and not options["lora"]:
        raise ValueError("--eight-bit needs --lora: weights in 8 bits cannot learn themselves.")
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
