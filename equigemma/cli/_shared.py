"""Loading with a progress bar, and the compilation cache, for several commands."""

import io
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


DTypeName = Literal["bfloat16", "float32", "float16"]
WeightsName = Literal["full", "int8", "int8-groupwise", "stored"]
CacheDTypeName = Literal["int8"]

DTYPE_HELP = "Dtype of weights and activations."
WEIGHTS_HELP = (
    "Weight quantization. int8: one scale per output channel; int8-groupwise: one per group of 32 "
    "weights; stored: the Q8_0 blocks of a .gguf file, as they are."
)
CACHE_HELP = "Dtype of the KV cache (default: that of the activations)."


def load_prepared(
    model: str, dtype: DTypeName, weights: WeightsName, **options: Any
) -> tuple[Any, Any]:
    """Model and tokenizer, ready for decoding; `options` of `eg.load`."""
    import equigemma as eg

    if weights == "stored":
        return load(model, dtype, quantized=True, **options)
    if weights == "full":
        return load(model, dtype, transform=eg.prepare, **options)
    group = 32 if weights == "int8-groupwise" else None
    return load(model, dtype, transform=partial(eg.quantize.int8, group_size=group), **options)


def read_text_input() -> str:
    """Standard input as text.

    **Raises:** `ValueError` if it is none.
    """
    data = sys.stdin.buffer.read()
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Standard input must be text in UTF-8; byte {error.start} is not."
        ) from None


def cache_dtype_of(name: CacheDTypeName | None) -> Any:
    """As `generate` takes it."""
    import jax.numpy as jnp

    return None if name is None else jnp.dtype(name)


def load(model: str, dtype: DTypeName, **options: Any) -> tuple[Any, Any]:
    """As `eg.load` with these options, with a bar on standard error while the weights are read."""
    import equigemma as eg

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # Elsewhere than at a terminal all that is left of a bar is an empty line.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"loading {model}", total=None)

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total)

        return eg.load(model, dtype=dtype, progress=show, **options)


def pictures(paths: Sequence[Path] | None, model: str) -> list[Any] | None:
    """The images of these files, read before the weights are; None for none.

    **Raises:** `ValueError` if one is not an image, or the model reads text only.
    """
    from equigemma.images import Picture

    if not paths:
        return None
    found = [Picture(path) for path in paths]
    if config_of(model).vision is None:
        raise ValueError(f"{model} reads text only: it has no vision tower for images.")
    return found


def config_of(model: str) -> Any:
    """The config of a known name or a file, without any weights."""
    import equigemma as eg
    from equigemma.checkpoint import load_config

    known = model.lower() in eg.variants.names()
    return eg.variants.get(model) if known else load_config(model)


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs in the user's cache folder, for a faster second start, and
    Python collect garbage less often: a third of the time to trace a program goes there.

    A folder of the environment variable `JAX_COMPILATION_CACHE_DIR` takes precedence.
    """
    import gc

    import jax

    from equigemma._cache_dir import user_cache_dir

    gc.set_threshold(100_000, 20, 100)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder: Path = user_cache_dir() / "compiled"
        # Compiled programs are run as they are: nobody else may write there.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
