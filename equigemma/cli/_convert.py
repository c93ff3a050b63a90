"""`equigemma convert`: a checkpoint to another format."""

from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from equigemma.cli import _options


Format = Literal["huggingface", "gguf", "orbax", "orbax-flat"]
DTypeName = Literal["bfloat16", "float32", "float16", "q8_0"]


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A .gguf file, a folder (Hugging Face or Orbax), or a name on the hub."
        ),
    ],
    target: Annotated[str, typer.Argument(help="A file that ends in .gguf, or a folder.")],
    format: Annotated[
        Format | None, typer.Option("--format", "-f", help="Of a folder; else huggingface.")
    ] = None,
    dtype: Annotated[
        DTypeName | None,
        typer.Option("--dtype", "-d", help="Of the weights; else as they are. q8_0: .gguf only."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a name on the hub.")
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Without a vision tower, of which nothing is read.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there.")] = False,
    shard_gb: Annotated[float, typer.Option(help="Largest .safetensors file, in GB.")] = 5.0,
) -> None:
    """Write a checkpoint in another format, and compare every weight.

    The target appears once it is complete and equal to the source as far as its dtype can be.
    """
    _options.above_zero("shard_gb", shard_gb)
    from equigemma.checkpoint._convert import convert as run

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True) as bar:
        writing = bar.add_task(f"writing {target}", total=None)
        checking = bar.add_task("comparing", total=None, visible=False)
        weights = 0

        def show_writing(done: int, total: int, name: str) -> None:
            bar.update(writing, completed=done, total=total)

        def show_checking(done: int, total: int, name: str) -> None:
            nonlocal weights
            weights += 1
            bar.update(checking, completed=done, total=total, visible=True)

        run(
            source,
            target,
            format=format,
            dtype=dtype,
            revision=revision,
            text_only=text_only,
            shard_bytes=int(shard_gb * 1e9),
            force=force,
            progress=show_writing,
            check_progress=show_checking,
        )
    console.print(f"[dim]{weights} weights written and compared[/]")
