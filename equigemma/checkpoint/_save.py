"""Models to files: `save` finds the format out from the path."""

import os
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from equigemma._typing import typed
from equigemma.checkpoint._errors import CheckpointError
from equigemma.checkpoint._extras import Extras, read_extras
from equigemma.checkpoint._files import new_file, new_folder
from equigemma.checkpoint._gguf_write import Q8_0, write_gguf
from equigemma.checkpoint._hf_tokenizer import VocabularyTokenizer, write_tokenizer
from equigemma.checkpoint._hf_write import may_replace, write_folder
from equigemma.checkpoint._orbax import is_part_of_orbax, write_orbax
from equigemma.checkpoint._stored import MissingTokenizer, Progress
from equigemma.nn import Transformer
from equigemma.tokenizer import Tokenizer


Format = Literal["huggingface", "gguf", "orbax", "orbax-flat"]


@typed
def save(
    model: Transformer,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    format: Format | None = None,
    dtype: jnp.dtype | type | str | None = None,
    shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Writes a model where other tools and `load` find it.

    ```python
    >>> import equigemma as eg
    >>> model, tokenizer = eg.load("gemma3-270m")  # doctest: +SKIP
    >>> eg.save(model, "tuned", tokenizer=tokenizer)  # for transformers  # doctest: +SKIP
    >>> eg.save(model, "tuned.gguf", tokenizer=tokenizer, dtype="q8_0")  # doctest: +SKIP

    ```

    It appears whole or not at all: what is there already stays until the last byte is written. A
    folder that is there must be a checkpoint; it is replaced.

    **Arguments:**

    - `path`: a file that ends in `.gguf`, for llama.cpp, or a folder, for `transformers`.
    - `tokenizer`: what `load` gave; a `.gguf` must have one. What the checkpoint that it came from
      says besides weights, such as a chat template, goes along if that is still there.
    - `format`: if not what `path` says: `"orbax"` is the layout of DeepMind's `gemma` package,
      `"orbax-flat"` its older one, in which the official files came.
    - `dtype`: of the weights: float32, bfloat16 or float16, and for a `.gguf` also `"q8_0"`, about
      8.5 bits each. By default they are kept as they are.
    - `shard_bytes`: for `transformers`, no file gets larger than this, unless one weight is.
    - `progress`: called after each weight with the bytes written, those of all, and its path.

    **Raises:** `CheckpointError` if the format cannot express the model, or if something cannot be
    written or would be lost; `ImportError` if a package is missing.
    """
    target = Path(path).expanduser()
    chosen = _format(target, format)
    kind = _dtype(dtype, chosen)
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be positive, got {shard_bytes}.")
    known = _vocabulary_tokenizer(tokenizer, chosen)
    extras = Extras()
    if known is not None and known.origin is not None and known.origin.exists():
        extras = read_extras(known.origin)
    try:
        match chosen:
            case "gguf":
                assert known is not None  # _vocabulary_tokenizer saw to it
                with new_file(target) as partial:
                    write_gguf(
                        model,
                        partial,
                        dtype=kind,
                        tokenizer=known,
                        extras=extras,
                        name=target.stem,
                        progress=progress,
                    )
            case "huggingface":
                with new_folder(target, may_replace) as partial:
                    write_folder(
                        model,
                        partial,
                        dtype=None if kind is None else jnp.dtype(kind),
                        shard_bytes=shard_bytes,
                        special=None if known is None else known.special,
                        extras=extras,
                        progress=progress,
                    )
                    if known is not None:
                        write_tokenizer(known, partial, extras)
            case "orbax" | "orbax-flat":
                with new_folder(target, is_part_of_orbax) as partial:
                    write_orbax(
                        model,
                        partial,
                        dtype=None if kind is None else jnp.dtype(kind),
                        flat=chosen == "orbax-flat",
                        progress=progress,
                    )
                    if known is not None:
                        write_tokenizer(known, partial, extras)
    except CheckpointError as error:
        raise CheckpointError(f"{target} cannot be saved: {error}") from error


def _format(target: Path, format: Format | None) -> Format:
    is_gguf = target.suffix.lower() == ".gguf"
    chosen = format or ("gguf" if is_gguf else "huggingface")
    if (chosen == "gguf") != is_gguf or target.suffix.lower() in (".safetensors", ".bin", ".pt"):
        raise CheckpointError(
            f"{target} must end in .gguf to be a file for llama.cpp; the other formats are folders."
        )
    return chosen


def _dtype(dtype: jnp.dtype | type | str | None, format: Format) -> str | None:
    """The name of the dtype asked for."""
    allowed = ["float32", "bfloat16", "float16"] + [Q8_0] * (format == "gguf")
    try:
        name = dtype if dtype is None or dtype == Q8_0 else jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name is not None and name not in allowed:
        raise CheckpointError(
            f"Weights are saved as {', '.join(allowed[:-1])} or {allowed[-1]}, got dtype={dtype}."
        )
    return name if name is None else str(name)


def _vocabulary_tokenizer(
    tokenizer: Tokenizer | None, format: Format
) -> VocabularyTokenizer | None:
    if isinstance(tokenizer, VocabularyTokenizer):
        return tokenizer
    if format == "gguf":
        raise CheckpointError("A .gguf holds its tokenizer: pass the one that load gave.")
    if tokenizer is None or isinstance(tokenizer, MissingTokenizer):
        return None
    raise CheckpointError(
        f"Only the tokenizers that load gives can be written, got a {type(tokenizer).__name__}."
    )
