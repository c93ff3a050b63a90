"""`equigemma convert`: a checkpoint to another format."""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from equigemma.cli import _options
from equigemma.cli._choices import CheckpointFormat, StoredDType


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A .gguf file, a folder (Hugging Face or Orbax), or a name on the hub."
        ),
    ],
    target: Annotated[str, typer.Argument(help="A file that ends in .gguf, or a folder.")],
    format: Annotated[
        CheckpointFormat | None,
        typer.Option("--format", "-f", help="Output format of a folder (default: huggingface)."),
    ] = None,
    dtype: Annotated[
        StoredDType | None,
        typer.Option(
            "--dtype", "-d", help="Weight dtype (default: as in the source; q8_0: only for .gguf)."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave out the vision tower.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing model.")] = False,
    shard_gb: Annotated[
        float, typer.Option(help="Maximum size of a .safetensors file in GB.")
    ] = 5.0,
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
