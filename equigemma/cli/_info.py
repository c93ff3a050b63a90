"""`equigemma info`: what a model is made of and how much memory it takes."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from equigemma.cli._shared import DTypeName, config_of


def info(
    model: Annotated[str, typer.Argument(help="Name of a model, or a .gguf file.")] = "gemma3-270m",
    length: Annotated[int, typer.Option(help="Tokens that the cache is to hold.")] = 32_768,
    dtype: Annotated[DTypeName, typer.Option(help="Of weights and cache.")] = "bfloat16",
) -> None:
    """Print layers, parameters, bytes by part, and the size of the cache."""
    import jax.numpy as jnp

    from equigemma.describe import cache_bytes, describe, parameter_counts

    if length < 1:
        raise ValueError(f"A cache needs room for at least one token, got --length {length}.")
    config = config_of(model)
    console = Console(highlight=False, soft_wrap=True)
    console.print(describe(config), markup=False)

    width = jnp.dtype(dtype).itemsize
    parts = Table("part", "parameters", f"bytes in {dtype}", box=None, pad_edge=False)
    parts.columns[1].justify = parts.columns[2].justify = "right"
    for part, count in parameter_counts(config).items():
        parts.add_row(part, f"{count:,}", f"{count * width:,}")
    console.print(parts)

    ring, full = (cache_bytes(config, length, dtype, ring=ring) for ring in (True, False))
    console.print(
        f"\ncache of {length:,} tokens: {ring:,} bytes, "
        f"{full:,} if every layer kept the full length"
    )
