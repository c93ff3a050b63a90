"""Checks of the options of `equigemma finetune`, before anything is read or written."""

from collections.abc import Mapping
from typing import Any

from equigemma.cli._options import above_zero, at_least, fraction, seed
from equigemma.cli._shape import LENGTH


def check(options: Mapping[str, Any]) -> None:
    """Refuses numbers that make no sense, each on its own and together.

    **Raises:** `ValueError` naming the option.
    """
    for name, least in _LEAST.items():
        if options[name] is not None:
            at_least(name, options[name], least)
    for name in ("learning_rate", "max_grad_norm"):
        if options[name] is not None:
            above_zero(name, options[name])
    for name in ("warmup", "validation_fraction"):
        fraction(name, options[name])
    seed(options["seed"])
    if options["eight_bit"] and not options["lora"]:
        raise ValueError("--eight-bit needs --lora: quantized weights cannot be trained.")
    if options["stored_dtype"] == "q8_0" and options["stored"] != "gguf":
        raise ValueError(
            f"--stored-dtype q8_0 is a dtype of .gguf files: give --format gguf as well, in place "
            f"of {options['stored']}."
        )
    if options["batch_tokens"] is not None:
        _check_rows(options["batch_tokens"], options["length"] or LENGTH, options["micro_batches"])


_LEAST = {
    "lora": 0,
    "weight_decay": 0,
    "steps": 1,
    "epochs": 1,
    "micro_batches": 1,
    "evaluate_every": 1,
    "save_every": 1,
    "length": 2,
    "batch_tokens": 2,
}


def _check_rows(batch_tokens: int, length: int, micro_batches: int) -> None:
    rows, rest = divmod(batch_tokens, length)
    if rest or not rows:
        raise ValueError(
            f"--batch-tokens must be a multiple of --length, got {batch_tokens} and {length}."
        )
    if rows % micro_batches:
        raise ValueError(
            f"--micro-batches must divide the {rows} rows of a batch, got {micro_batches}."
        )
