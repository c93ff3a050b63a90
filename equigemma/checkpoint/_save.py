"""Models to files: `save` finds the format out from the path."""

import os
from pathlib import Path

import jax.numpy as jnp

from equigemma._typing import typed
from equigemma.checkpoint._write import Format, Plan, write
from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._stored import Progress
from equigemma.checkpoint.core._tokenizer_files import VocabularyTokenizer
from equigemma.checkpoint.gguf._write import Q8_0
from equigemma.embedding import Embedder
from equigemma.nn import Transformer, check_models, check_unstacked
from equigemma.quantize import quantization_of
from equigemma.tokenizers import Tokenizer


@typed
def save(
    model: Transformer | Embedder,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    format: Format | None = None,
    dtype: jnp.dtype | type | str | None = None,
    shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Writes a model where other tools and `load` or `load_embedder` find it.

    ```python
    >>> import equigemma as eg
    >>> model, tokenizer = eg.load("gemma3-270m")  # doctest: +SKIP
    >>> eg.save(model, "tuned", tokenizer=tokenizer)  # for transformers  # doctest: +SKIP
    >>> eg.save(model, "tuned.gguf", tokenizer=tokenizer, dtype="q8_0")  # doctest: +SKIP

    ```

    It appears whole or not at all: what is there already stays until the last byte is written. A
    folder that is there must be a checkpoint; it is replaced.

    Only a `.gguf` with a vision tower is two files, and they get their names one after the other,
    the tower first. A kill between the two can leave the new tower beside no text model, or beside
    the old one; saving once more mends it.

    **Arguments:**

    - `model`: or an `Embedder`, which becomes a folder for `sentence-transformers` or a `.gguf`
      file, for `load_embedder` too.
    - `path`: a file that ends in `.gguf`, for llama.cpp, or a folder, for `transformers`. A vision
      tower goes to a second file beside the first, `mmproj-NAME.gguf`.
    - `tokenizer`: what `load` gave; a `.gguf` must have one. What the checkpoint that it came from
      says besides weights, such as a chat template, goes along if that is still there.
    - `format`: if not what `path` says: `"orbax"` is the layout of DeepMind's `gemma` package,
      `"orbax-flat"` its older one, in which the official files came. `"equigemma"` is a folder for
      `load` alone; a quantized model becomes one, in which nothing of it is lost.
    - `dtype`: of the weights: float32, bfloat16 or float16, and for a `.gguf` also `"q8_0"`, about
      8.5 bits each. By default they are kept as they are: in a `.gguf`, integers of 8 bits stay
      the same integers, and their scales are float16, which those of groups are already.
    - `shard_bytes`: for `transformers`, no file gets larger than this, unless one weight is.
    - `progress`: called after each weight with the bytes written, those of all, and its path.

    **Raises:** `CheckpointError` if the format cannot express the model, or if something cannot be
    written or would be lost; `ImportError` if a package is missing.
    """
    check_unstacked(model)
    target = Path(path).expanduser()
    try:
        check_models(model)
    except ValueError as error:
        raise CheckpointError(f"{target} cannot be saved: {error}") from error
    if (
        format is None
        and isinstance(model, Transformer)
        and dtype is None
        and quantization_of(model)
    ):
        format = None if target.suffix.lower() == ".gguf" else "equigemma"
    plan = plan_save(target, tokenizer, format=format, dtype=dtype)
    write(model, target, plan, shard_bytes=shard_bytes, progress=progress)


def plan_save(
    target: Path,
    tokenizer: Tokenizer | None,
    *,
    format: Format | None,
    dtype: jnp.dtype | type | str | None,
) -> Plan:
    """The arguments of `save`, made sense of.

    **Raises:** `CheckpointError` if they make none.
    """
    chosen = _format(target, format)
    return Plan(chosen, _dtype(dtype, chosen), _vocabulary_tokenizer(tokenizer, chosen))


def _format(target: Path, format: Format | None) -> Format:
    is_gguf = target.suffix.lower() == ".gguf"
    chosen = format or ("gguf" if is_gguf else "huggingface")
    if chosen == "gguf" and not is_gguf:
        raise CheckpointError(f"{target} must end in .gguf to be a file of that format.")
    if chosen != "gguf" and target.suffix.lower() in (".gguf", ".safetensors", ".bin", ".pt"):
        raise CheckpointError(
            f"A checkpoint of the format {chosen} is a folder; {target} is the name of a file."
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
    if tokenizer is None and format == "gguf":
        raise CheckpointError(
            "A .gguf holds its tokenizer, and there is none: pass what load gave."
        )
    if tokenizer is None:
        return None
    raise CheckpointError(
        f"Only the tokenizers that load gives can be written, got a {type(tokenizer).__name__}."
    )
