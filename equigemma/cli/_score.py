"""`equigemma score`: log-likelihood and perplexity of texts, as JSON lines."""

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

from equigemma._json_records import Record, parse, records
from equigemma._line_errors import raise_line_errors
from equigemma._text_file import check_text, read_bytes
from equigemma.cli._shared import (
    CACHE_HELP,
    DTYPE_HELP,
    WEIGHTS_HELP,
    CacheDTypeName,
    DTypeName,
    WeightsName,
    cache_dtype_of,
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
            help="Format of the file. text: one text; lines: one text per line; jsonl: JSON "
            'records {"text": ...}, one per line or in an array; auto: jsonl for .jsonl, .ndjson '
            "and .json, else text.",
        ),
    ] = "auto",
    brief: Annotated[
        bool, typer.Option("--brief", help="Leave out the log-probabilities of single tokens.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the totals as a last JSON object on standard output."),
    ] = False,
    dtype: Annotated[DTypeName, typer.Option(help=DTYPE_HELP)] = "bfloat16",
    bits: Annotated[WeightsName, typer.Option("--weights", "-w", help=WEIGHTS_HELP)] = "full",
    cache_dtype: Annotated[CacheDTypeName | None, typer.Option(help=CACHE_HELP)] = None,
) -> None:
    """Print the log-probability of each token of texts, and their perplexity.

    One JSON object per text goes to standard output, the totals to standard error.
    """
    texts = read(file, kind)
    keep_compiled_programs()
    from equigemma._score import scores

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
        # A bar and the results in one terminal would be in each other's way; elsewhere than at a
        # terminal all that is left of a bar is an empty line.
        disable=sys.stdout.isatty() or not console.is_terminal,
    ) as bar:
        task = bar.add_task(f"scoring {file}", total=total)
        found = scores(
            weights,
            tokenizer,
            (text for _, text in texts),
            progress=lambda count: bar.advance(task, count),
            cache_dtype=cache_dtype_of(cache_dtype),
        )
        for (line, _), result in zip(texts, found, strict=True):
            entry = _entry(line, result, None if brief else tokenizer)
            sys.stdout.write(json.dumps(entry, ensure_ascii=False) + "\n")
            sys.stdout.flush()
            nll, tokens = nll - result.logprob, tokens + len(result.tokens)
    mean = nll / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf
    if as_json:
        totals = {"texts": len(texts), "tokens": tokens, "logprob": _number(-nll)}
        totals |= {"mean_nll": _number(mean), "perplexity": _number(perplexity)}
        sys.stdout.write(json.dumps(totals) + "\n")
        return
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
    data = sys.stdin.buffer.read() if file == "-" else read_bytes(file)
    check_text(data, name)
    if kind == "auto":
        is_json = Path(file).suffix.lower() in (".jsonl", ".ndjson", ".json")
        kind = "jsonl" if is_json else "text"
    texts: list[tuple[int, str]] = []
    bad: list[str] = []
    for record in _records(data, kind):
        try:
            texts.append((record.line, _text(record)))
        except ValueError as error:
            bad.append(str(error) if kind == "text" else f"line {record.line}: {error}")
    raise_line_errors(name, bad)
    if not texts:
        raise ValueError(f"{name} has no text.")
    return texts


def _records(data: bytes, kind: InputKind) -> Iterator[Record]:
    """Everything that is not blank, as an object with a text."""
    whole = _decoded(1, data)
    if kind == "jsonl" and whole.error is None:
        yield from records(str(whole.value))
        return
    lines = [whole]
    if kind != "text":
        parts = enumerate(data.split(b"\n"), start=1)
        lines = [_decoded(number, line.removesuffix(b"\r")) for number, line in parts]
    for line in lines:
        text = str(line.value)
        if line.error is not None:
            yield line
        elif text.strip():
            is_json = kind == "jsonl"
            yield parse(line.line, text) if is_json else line._replace(value={"text": text})


def _decoded(number: int, data: bytes) -> Record:
    try:
        return Record(number, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Record(number, error=f"expected text in UTF-8; byte {error.start} is not.")


def _text(record: Record) -> str:
    if record.error is not None:
        raise ValueError(record.error)
    match record.value:
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
