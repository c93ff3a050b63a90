"""`equigemma info`: what a model is made of and how much memory it takes."""

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from equigemma.cli._shared import DTypeName, config_of


LENGTHS = (4_096, 32_768, 131_072)
"""Tokens in a conversation, a long document, and all that Gemma 3 was trained to see."""


def info(
    model: Annotated[
        str, typer.Argument(help="Name of a model, a .gguf file, or a folder.")
    ] = "gemma3-270m",
    length: Annotated[
        int | None, typer.Option(help="Capacity of the KV cache in tokens (default 4k, 32k, 128k).")
    ] = None,
    dtype: Annotated[DTypeName, typer.Option(help="Dtype of weights and KV cache.")] = "bfloat16",
) -> None:
    """Print layers, parameters, bytes by part, and the size of the cache."""
    if length is not None and length < 1:
        raise ValueError(f"A cache needs a capacity of at least one token, got --length {length}.")
    console = Console(highlight=False, soft_wrap=True)
    # Written at once: a pipe that is closed meanwhile is none of `rich`'s business.
    with console.capture() as text:
        _print(config_of(model), length, dtype, console)
    sys.stdout.write(text.get())


def _print(config: Any, length: int | None, dtype: DTypeName, console: Console) -> None:
    import jax.numpy as jnp

    from equigemma._describe import cache_bytes, describe, is_bidirectional, parameter_counts

    console.print(describe(config), markup=False)

    width = jnp.dtype(dtype).itemsize
    parts = Table("part", "parameters", f"bytes in {dtype}", box=None, pad_edge=False)
    parts.columns[1].justify = parts.columns[2].justify = "right"
    for part, count in parameter_counts(config).items():
        parts.add_row(part, f"{count:,}", f"{count * width:,}")
    console.print(parts)

    if is_bidirectional(config):
        maps = _embedder_parameters(config)
        total = parameter_counts(config)["total"] + maps
        console.print(
            "\nIt is bidirectional and has no KV cache. Linear maps of an embedder, as in "
            f"EmbeddingGemma, have {maps:,} parameters more: {total:,} in all."
        )
        return
    caches = Table("cache of", "bytes", "if every layer kept all", box=None, pad_edge=False)
    for column in caches.columns:
        column.justify = "right"
    for tokens in LENGTHS if length is None else (length,):
        ring, full = (cache_bytes(config, tokens, dtype, ring=ring) for ring in (True, False))
        caches.add_row(f"{tokens:,} tokens", f"{ring:,}", f"{full:,}")
    console.print()
    console.print(caches)


def _embedder_parameters(config: Any) -> int:
    """Those of the linear maps between the average of a text and its vector."""
    import equinox as eqx
    import jax

    from equigemma.embedding import Embedder

    embedder = eqx.filter_eval_shape(Embedder, config, key=jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(embedder.dense))
