"""`equigemma generate`: text after a prompt, as it comes."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from equigemma.cli import _options
from equigemma.cli._sampling import (
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    Sampling,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from equigemma.cli._shared import (
    CACHE_HELP,
    DTYPE_HELP,
    WEIGHTS_HELP,
    CacheDTypeName,
    DTypeName,
    WeightsName,
    cache_dtype_of,
    keep_compiled_programs,
    load_prepared,
    pictures,
    read_text_input,
)


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Name of a model, a .gguf file, or a folder.")
    ] = "gemma3-270m",
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            "-i",
            help="Image for the prompt; may be given several times. Each replaces one "
            "<start_of_image> of the prompt, or all come before it.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    num_samples: Annotated[int, typer.Option(help="Number of texts to generate.")] = 1,
    seed: Seed = 0,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object per text, with its prompt and text."),
    ] = False,
    dtype: Annotated[DTypeName, typer.Option(help=DTYPE_HELP)] = "bfloat16",
    bits: Annotated[WeightsName, typer.Option("--weights", "-w", help=WEIGHTS_HELP)] = "full",
    cache_dtype: Annotated[CacheDTypeName | None, typer.Option(help=CACHE_HELP)] = None,
) -> None:
    """Continue a text.

    The text goes to standard output, everything else to standard error.
    """
    sampling = Sampling(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop or (), seed
    )
    sampling.check()
    _options.at_least("num_samples", num_samples, 1)
    if num_samples > 1 and not temperature:
        raise ValueError(
            "Greedy decoding gives the same text each time: for several --num-samples give a "
            "--temperature above 0, such as 1."
        )
    if prompt == "-":
        prompt = read_text_input()
    if not prompt:
        raise ValueError("The prompt is empty: give at least one character to continue.")
    _options.text("The prompt", prompt)
    images = pictures(image, model)

    keep_compiled_programs()
    read = partial(load_prepared, model, dtype, bits)
    options = sampling.arguments | {"images": images, "cache_dtype": cache_dtype_of(cache_dtype)}
    options["seed"] = seed
    if as_json or num_samples > 1:
        _print_texts(*read(), prompt, options, num_samples, as_json)
    else:
        _print_stream(_stream(read, prompt, options), prompt)


def _stream(
    read: Callable[..., tuple[Any, Any]], prompt: str, options: dict[str, Any]
) -> Iterator[str]:
    """The pieces of one text, of a model that is compiled for while `read` loads it."""
    import equigemma as eg
    from equigemma.text import stream_ahead

    if options["images"] is not None:
        return eg.stream(*read(), prompt, **options)
    options = {name: value for name, value in options.items() if name != "images"}
    found: list[Callable[[Any], Iterator[str]]] = []
    weights, _ = read(
        on_shapes=lambda shapes, tokenizer: found.append(
            stream_ahead(shapes, tokenizer, prompt, **options)
        )
    )
    return found[0](weights)


def _print_stream(pieces: Iterator[str], prompt: str) -> None:
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


def _print_texts(
    weights: Any,
    tokenizer: Any,
    prompt: str,
    options: dict[str, Any],
    num_samples: int,
    as_json: bool,
) -> None:
    """All texts at once: as JSON lines, or with an empty line between them."""
    import equigemma as eg

    # One text has the same draws with and without JSON.
    several = {"num_samples": num_samples} if num_samples > 1 else {}
    found = eg.generate(weights, tokenizer, prompt, **several, **options)
    texts = [found] if isinstance(found, str) else found
    if as_json:
        lines = [json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) for text in texts]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    else:
        sys.stdout.write("\n".join(f"{prompt}{text}\n" for text in texts))
