"""`equigemma finetune`: fine-tuning on a file of texts."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from equigemma._text_file import read_text
from equigemma.cli._choices import CheckpointFormat, StoredDType
from equigemma.cli._curves import draw_curves
from equigemma.cli._finetune_config import BaseDType, ComputeDType, FinetuneConfig
from equigemma.cli._finetune_data import FinetuneData
from equigemma.cli._progress import ProgressLogger, bar_of
from equigemma.cli._settings import FIXED, claim, clear, compare, is_claimed, sha256, write
from equigemma.cli._shape import LENGTH, STEP_TOKENS
from equigemma.cli._shared import keep_compiled_programs, load
from equigemma.cli._tuning import (
    AdapterKind,
    OptimConfig,
    Schedule,
    escape,
    init_or_restore,
    loss,
    merge_adapters,
    write_adapters,
    write_samples,
)


if TYPE_CHECKING:
    from equigemma import train


def finetune(
    model: Annotated[
        str, typer.Argument(help="Name of a model, a .gguf file, or a folder to start from.")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            help='Training data: JSON records with "text", "prompt" and "completion", or '
            '"messages", one per line or in an array; or a text file.'
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder.")],
    lora: Annotated[int, typer.Option(help="LoRA rank (0 = full fine-tuning).")] = 0,
    lora_kind: Annotated[AdapterKind, typer.Option(help="Adapter type.")] = "lora",
    quantize_base: Annotated[
        BaseDType,
        typer.Option(help="Quantize the frozen base weights under adapters (as QLoRA does)."),
    ] = "none",
    steps: Annotated[
        int | None, typer.Option(help="Number of optimizer steps (default: that of --epochs).")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Number of passes over the training data.")] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate (default 2e-5; 2e-4 with LoRA).")
    ] = None,
    schedule: Annotated[
        Schedule, typer.Option(help="Learning-rate schedule after warm-up.")
    ] = "cosine",
    warmup: Annotated[float, typer.Option(help="Warm-up fraction.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="AdamW weight decay.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Max gradient norm.")] = 1.0,
    length: Annotated[
        int | None,
        typer.Option(
            help="Sequence length of packed rows; longer texts are split (default: at most "
            f"{LENGTH}, as the data fills them)."
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Batch size in tokens, a multiple of --length (default: at most "
            f"{STEP_TOKENS}, as the data fills them)."
        ),
    ] = None,
    micro_batches: Annotated[
        int, typer.Option(help="Gradient accumulation: micro-batches per step, to save memory.")
    ] = 1,
    validation_fraction: Annotated[
        float, typer.Option(help="Validation fraction of the data.")
    ] = 0.05,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations (default: a tenth of all).")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Random seed (data order, split, adapter init).")] = 0,
    dtype: Annotated[ComputeDType, typer.Option(help="Compute dtype.")] = "bfloat16",
    format: Annotated[
        CheckpointFormat, typer.Option("--format", "-f", help="Output checkpoint format.")
    ] = "huggingface",
    output_dtype: Annotated[
        StoredDType, typer.Option(help="Output weight dtype (q8_0: only with --format gguf).")
    ] = "bfloat16",
) -> None:
    """Fine-tune a model: all weights, or LoRA adapters.

    An interrupted run resumes with the same command.
    """
    config = FinetuneConfig(
        model=model,
        data=data,
        out=out,
        lora=lora,
        lora_kind=lora_kind,
        quantize_base=quantize_base,
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        length=length,
        batch_tokens=batch_tokens,
        micro_batches=micro_batches,
        validation_fraction=validation_fraction,
        evaluate_every=evaluate_every,
        save_every=save_every,
        seed=seed,
        dtype=dtype,
        format=format,
        output_dtype=output_dtype,
    )
    run(config, Console(stderr=True, highlight=False))


def run(config: FinetuneConfig, console: Console) -> None:
    """Trains, or resumes, and writes the tuned model."""
    read_text(config.data)  # what is no text is said before the model is loaded
    known = config.settings(FIXED) | {"data_sha256": sha256(config.data)}
    compare(config.out, known)
    with claim(config.out):
        trained = _train(config, known, console)
    validation_losses = _draw(config.out, console)
    state, signal = trained.fitted.state, trained.fitted.signal
    if signal is not None:
        console.print(
            f"Stopped by {signal.name} after step {int(state.step)}, which is saved; "
            f"the same command resumes.",
            soft_wrap=True,
        )
        raise typer.Exit(128 + signal)
    _finish(trained, config, console)
    if validation_losses:
        console.print(
            f"validation loss: {validation_losses[0]:.4f} before, {validation_losses[-1]:.4f} now"
        )


class _Trained(NamedTuple):
    """The result of training, and what goes along with it."""

    fitted: "train.Fitted"
    steps: int
    tokenizer: Any
    prompts: Sequence[Any]


def _train(config: FinetuneConfig, known: dict[str, Any], console: Console) -> _Trained:
    """Loads the model and the data, and trains from the step that was saved last.

    Nothing is written before all of it has been read.
    """
    from equigemma import train
    from equigemma.checkpoint._save import plan_save

    out = config.out
    keep_compiled_programs()
    weights, tokenizer = load(config.model, "bfloat16" if config.lora else "float32")
    # What cannot be saved is said now.
    plan_save(config.output_path, tokenizer, format=config.format, dtype=config.output_dtype)
    data_set = FinetuneData.read(
        config.data,
        weights,
        tokenizer,
        validation_fraction=config.validation_fraction,
        length=config.length,
        rows=config.rows,
        micro_batches=config.micro_batches,
        seed=config.seed,
    )
    plan = config.optim(config.steps or data_set.count(config.epochs))
    shape = data_set.shape
    settings = known | {"length": shape.length, "batch_tokens": shape.rows * shape.length}
    settings |= config.settings(("epochs", "dtype")) | plan._asdict()
    for change in compare(out, settings):
        console.print(f"[yellow]{escape(change)}[/]")
    if not is_claimed(out):
        clear(out)
    write(out, settings)
    with train.Checkpoints(out / "checkpoints") as checkpoints:
        if not (out / "samples.jsonl").exists():
            write_samples(weights, tokenizer, 0, data_set.prompts, out, console)
        saved, optimizer = init_or_restore(weights, plan, config.adapters, checkpoints, out)
        del weights
        fitted = _fit(saved, optimizer, data_set, plan, checkpoints, config, console)
    return _Trained(fitted, plan.steps, tokenizer, data_set.prompts)


def _fit(
    saved: "train.Saved",
    optimizer: Any,
    data_set: FinetuneData,
    plan: OptimConfig,
    checkpoints: "train.Checkpoints",
    config: FinetuneConfig,
    console: Console,
) -> "train.Fitted":
    """Takes the steps that are left, and writes and shows how it goes."""
    from equigemma import train

    count, shape = int(saved.state.step), data_set.shape
    done = f", {count} of them done before" if count else ""
    console.print(
        f"{len(data_set.train_examples)} training examples in batches of {shape.rows} x "
        f"{shape.length} tokens, {shape.padding:.0%} padding; {plan.steps} steps{done}",
        soft_wrap=True,
    )
    objective = partial(loss, config.dtype)
    with (
        train.MetricsFile(config.out / "metrics.jsonl", after=count) as metrics,
        bar_of(console, plan.steps, count) as bar,
    ):
        evaluate = train.make_evaluate(objective)
        logger = ProgressLogger(plan, data_set, evaluate, metrics, bar, every=config.evaluate_every)
        logger.begin(saved.state, count)
        return train.fit(
            train.make_step(
                objective,
                optimizer,
                max_grad_norm=plan.max_grad_norm,
                micro_batches=plan.micro_batches,
            ),
            saved.state,
            logger.measured(data_set.train_batches(saved.data_state)),
            steps=plan.steps,
            checkpoints=checkpoints,
            save_every=config.save_every,
            data_state=saved.data_state,
            report=logger.report,
        )


def _draw(out: Path, console: Console) -> list[float]:
    """Draws what was measured; the validation losses."""
    from equigemma import train

    lines = train.read_metrics(out / "metrics.jsonl")
    if not draw_curves(lines, out / "curves.png"):
        hint = escape('pip install "equigemma[finetune]"')
        console.print(f"[yellow]No curves.png: matplotlib is not installed: {hint}.[/]")
    return [line["validation_loss"] for line in lines if "validation_loss" in line]


def _finish(trained: _Trained, config: FinetuneConfig, console: Console) -> None:
    """Writes the model, its adapters, and samples of its text."""
    from equigemma import save, train

    out, adapters, path = config.out, config.adapters, config.output_path
    tuned = train.merge(trained.fitted.state)
    if adapters.rank:
        write_adapters(tuned, config.model, out, console)
    tuned = merge_adapters(tuned, config.model, adapters)
    dtype = config.output_dtype
    save(tuned, path, tokenizer=trained.tokenizer, format=config.format, dtype=dtype)
    console.print(f"The model is in {path}.")
    write_samples(tuned, trained.tokenizer, trained.steps, trained.prompts, out, console)
