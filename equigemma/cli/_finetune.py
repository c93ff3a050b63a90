"""`equigemma finetune`: a model learns from a file of texts."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.console import Console

from equigemma.cli._curves import draw_curves
from equigemma.cli._lessons import Lessons
from equigemma.cli._settings import FIXED, claim, sha256
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
from equigemma.cli._watch import Watch, bar_of


if TYPE_CHECKING:
    from equigemma import train


def finetune(
    model: Annotated[str, typer.Argument(help="Name of a model, a file, or a folder.")],
    data: Annotated[
        Path,
        typer.Argument(
            help="JSON lines of text, prompt and completion, or messages with images; or a text."
        ),
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
    options = dict(locals())
    rows = _check(options)
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
    _claim(options, plan, console)
    learned = _learn(options, rows, plan, adapting, console)
    held_out_losses = _draw(out, console)
    state, signal = learned.fitted.state, learned.fitted.signal
    if signal is not None:
        console.print(
            f"Stopped by {signal.name} after step {int(state.step)}, which is saved; "
            f"the same command goes on."
        )
        raise typer.Exit(128 + signal)
    _finish(learned, adapting, options, console)
    if held_out_losses:
        console.print(
            f"held-out loss: {held_out_losses[0]:.4f} before, {held_out_losses[-1]:.4f} now"
        )


class _Learned(NamedTuple):
    """What training leaves, and what goes along with it."""

    fitted: "train.Fitted"
    steps: int
    tokenizer: Any
    prompts: Sequence[Any]


def _learn(
    options: dict[str, Any], rows: int, plan: Plan, adapting: Adapting, console: Console
) -> _Learned:
    """Loads the model and the data, and trains from the step that was saved last."""
    from equigemma import train
    from equigemma.checkpoint._save import plan_save

    out, stored = options["out"], options["stored"]
    with train.Checkpoints(out / "checkpoints") as checkpoints:
        keep_compiled_programs()
        weights, tokenizer = load(options["model"], "bfloat16" if adapting.rank else "float32")
        # What cannot be saved is said now.
        target = path_of(stored, out)
        plan_save(target, tokenizer, format=stored, dtype=options["stored_dtype"])
        shape = {name: options[name] for name in ("length", "held_out", "seed")}
        lessons = Lessons.read(options["data"], weights, tokenizer, rows=rows, **shape)
        if not plan.steps:
            plan = plan._replace(steps=lessons.count(options["epochs"]))
        if not (out / "samples.jsonl").exists():
            write_samples(weights, tokenizer, 0, lessons.prompts, out, console)
        saved, optimizer = begin(weights, plan, adapting, checkpoints, out)
        del weights
        fitted = _fit(saved, optimizer, lessons, plan, checkpoints, options, console)
    return _Learned(fitted, plan.steps, tokenizer, lessons.prompts)


def _claim(options: dict[str, Any], plan: Plan, console: Console) -> None:
    """Takes the folder for this run, or for more of the one that it holds."""
    from equigemma import train

    data, out = options["data"], options["out"]
    if not data.is_file():
        raise ValueError(f"{data}: there is no such file to learn from.")
    train.check_writable(out)
    known = options | {"data": str(data), "data_sha256": sha256(data)} | plan._asdict()
    settings = {name: known[name] for name in (*FIXED, "epochs", "dtype", *plan._fields)}
    for change in claim(out, settings):
        console.print(f"[yellow]{change}[/]")


def _fit(
    saved: "train.Saved",
    optimizer: Any,
    lessons: Lessons,
    plan: Plan,
    checkpoints: "train.Checkpoints",
    options: dict[str, Any],
    console: Console,
) -> "train.Fitted":
    """Takes the steps that are left, and writes and shows how it goes."""
    from equigemma import train

    count = int(saved.state.step)
    done = f", {count} of them done before" if count else ""
    console.print(f"{len(lessons.learned)} pieces of text, {plan.steps} steps{done}")
    objective = partial(loss, options["dtype"])
    with (
        train.MetricsFile(options["out"] / "metrics.jsonl", after=count) as metrics,
        bar_of(console, plan.steps, count) as bar,
    ):
        evaluate = train.make_evaluate(objective)
        watch = Watch(plan, lessons, evaluate, metrics, bar, every=options["evaluate_every"])
        watch.begin(saved.state, count)
        return train.fit(
            train.make_step(objective, optimizer, clip=plan.clip, micro_batches=plan.micro_batches),
            saved.state,
            lessons.feed(saved.place),
            steps=plan.steps,
            checkpoints=checkpoints,
            save_every=options["save_every"],
            place=saved.place,
            report=watch.report,
        )


def _draw(out: Path, console: Console) -> list[float]:
    """Draws what was measured; the held-out losses."""
    from equigemma import train

    lines = train.read_metrics(out / "metrics.jsonl")
    if not draw_curves(lines, out / "curves.png"):
        hint = escape('pip install "equigemma[finetune]"')
        console.print(f"[yellow]No curves.png: matplotlib is not installed: {hint}.[/]")
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


def _finish(
    learned: _Learned, adapting: Adapting, options: dict[str, Any], console: Console
) -> None:
    """Writes the model, its adapters, and samples of its text."""
    from equigemma import save, train

    out, stored = options["out"], options["stored"]
    tuned = train.merge(learned.fitted.state)
    if adapting.rank:
        write_adapters(tuned, options["model"], out, console)
    tuned = whole(tuned, options["model"], adapting)
    path = path_of(stored, out)
    save(tuned, path, tokenizer=learned.tokenizer, format=stored, dtype=options["stored_dtype"])
    console.print(f"The model is in {path}.")
    write_samples(tuned, learned.tokenizer, learned.steps, learned.prompts, out, console)


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
