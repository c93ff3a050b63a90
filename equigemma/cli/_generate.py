"""`equigemma generate`: text after a prompt, as it comes."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from equigemma.cli._shared import (
    WEIGHTS_HELP,
    CacheName,
    DTypeName,
    WeightsName,
    cache_dtype,
    keep_compiled_programs,
    load_prepared,
)


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Name of a model, or a .gguf file.")
    ] = "gemma3-270m",
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            "-i",
            help="An image that the prompt is about; give it again for more. Each stands where the "
            "prompt says <start_of_image>, or all are before it.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Stop after so many tokens.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0: the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature above 0.")] = 0,
    dtype: Annotated[DTypeName, typer.Option(help="Of weights and activations.")] = "bfloat16",
    bits: Annotated[WeightsName, typer.Option("--weights", "-w", help=WEIGHTS_HELP)] = "full",
    cache: Annotated[
        CacheName, typer.Option(help="Keys and values; 8bit: half of the memory of bfloat16.")
    ] = "full",
) -> None:
    """Continue a text.

    The text goes to standard output, everything else to standard error.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise ValueError("The prompt is empty; write something to go on from.")

    keep_compiled_programs()
    import equigemma as eg

    weights, tokenizer = load_prepared(model, dtype, bits)
    pieces = eg.stream(
        weights,
        tokenizer,
        prompt,
        images=image or None,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        cache_dtype=cache_dtype(cache),
    )
    sys.stdout.write(prompt)
    tokens, first, started = 0, 0.0, time.perf_counter()
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        tokens += 1
        first = first or time.perf_counter()
    sys.stdout.write("\n")

    speed = (tokens - 1) / (time.perf_counter() - first) if tokens > 1 else 0.0
    Console(stderr=True, highlight=False).print(
        f"[dim]{tokens} tokens, first after {first - started:.1f} s, then {speed:.1f} tokens/s[/]"
    )
