"""`equigemma score`: how probable a model finds texts, as JSON lines."""

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from equigemma._bad_lines import check_lines
from equigemma.cli._shared import (
    WEIGHTS_HELP,
    CacheName,
    DTypeName,
    WeightsName,
    cache_dtype,
    keep_compiled_programs,
    load,
    load_prepared,
)


InputKind = Literal["auto", "text", "lines", "jsonl"]


def score(
    model: Annotated[str, typer.Argument(help="Name of a model, a .gguf file, or a folder.")],
    file: Annotated[str, typer.Argument(help="File of texts; - reads standard input.")],
    kind: Annotated[
        InputKind,
        typer.Option(
            "--input",
            "-i",
            help='text: the file is one text; lines: each line is; jsonl: each line is {"text": '
            "...}; auto: jsonl if its name ends so, else text.",
        ),
    ] = "auto",
    brief: Annotated[bool, typer.Option("--brief", help="Leave out the single tokens.")] = False,
    dtype: Annotated[DTypeName, typer.Option(help="Of weights and activations.")] = "bfloat16",
    bits: Annotated[WeightsName, typer.Option("--weights", "-w", help=WEIGHTS_HELP)] = "full",
    cache: Annotated[
        CacheName, typer.Option(help="Keys and values; 8bit: half of the memory of bfloat16.")
    ] = "full",
) -> None:
    """Print the log-probability of each token of texts, and their perplexity.

    One JSON object for each text goes to standard output, a summary to standard error.
    """
    texts = read(file, kind)
    keep_compiled_programs()
    from equigemma.score import scores

    read_as = load if bits == "full" else partial(load_prepared, weights=bits)
    weights, tokenizer = read_as(model, dtype)
    total = sum(len(tokenizer.encode(text)) - 1 for _, text in texts)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True, highlight=False)
    nll, tokens = 0.0, 0
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        # A bar and the results in one terminal would be in each other's way.
        disable=sys.stdout.isatty(),
    ) as bar:
        task = bar.add_task(f"scoring {file}", total=total)
        found = scores(
            weights,
            tokenizer,
            (text for _, text in texts),
            progress=lambda count: bar.advance(task, count),
            cache_dtype=cache_dtype(cache),
        )
        for (line, _), result in zip(texts, found, strict=True):
            entry = _entry(line, result, None if brief else tokenizer)
            sys.stdout.write(json.dumps(entry, ensure_ascii=False) + "\n")
            sys.stdout.flush()
            nll, tokens = nll - result.logprob, tokens + len(result.tokens)
    mean = nll / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf
    console.print(
        f"{len(texts)} texts, {tokens} tokens, {mean:.4f} nats per token, "
        f"perplexity {perplexity:.3f}"
    )


def read(file: str, kind: InputKind) -> list[tuple[int, str]]:
    """Texts and the lines they begin on.

    **Raises:** `ValueError` naming every bad line by its number (the first ten of them), or if
    there is no text; `OSError` if the file cannot be read.
    """
    name = "standard input" if file == "-" else file
    data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
    if kind == "auto":
        kind = "jsonl" if Path(file).suffix.lower() in (".jsonl", ".ndjson") else "text"
    lines = [data] if kind == "text" else data.split(b"\n")
    texts: list[tuple[int, str]] = []
    bad: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                texts.append((number, _text(line, kind)))
            except ValueError as error:
                bad.append(f"line {number}: {error}" if kind != "text" else str(error))
    check_lines(name, bad)
    if not texts:
        raise ValueError(f"{name} has no text.")
    return texts


def _text(line: bytes, kind: InputKind) -> str:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8; byte {error.start} is not.") from None
    if kind == "lines":
        return text.removesuffix("\r")
    if kind == "text":
        return text
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object, got no JSON ({error}).") from None
    match entry:
        case {"text": str(found)} if found:
            try:
                found.encode()
            except UnicodeEncodeError:
                raise ValueError("its text holds half of a surrogate pair.") from None
            return found
    raise ValueError('expected an object with a "text" that is a string and not empty.')


def _entry(line: int, result: Any, tokenizer: Any) -> dict[str, Any]:
    entry = {
        "line": line,
        "tokens": len(result.tokens),
        "logprob": _number(result.logprob),
        "mean_nll": _number(result.mean_nll),
        "perplexity": _number(result.perplexity),
    }
    if tokenizer is not None:
        entry["token_ids"] = result.tokens.tolist()
        entry["pieces"] = list(_pieces(tokenizer, entry["token_ids"]))
        entry["logprobs"] = [_number(value) for value in result.logprobs.tolist()]
    return entry


def _pieces(tokenizer: Any, ids: list[int]) -> Iterator[str]:
    for index in ids:
        yield tokenizer.token_bytes(index).decode(errors="replace")


def _number(value: float) -> float | None:
    """JSON has no infinity and no "not a number"."""
    return value if math.isfinite(value) else None
