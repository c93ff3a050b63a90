"""Files to pytrees: `load` finds the format out from what it is given."""

import os as _os
from collections.abc import Callable as _Callable
from contextlib import suppress as _suppress
from difflib import get_close_matches as _get_close_matches
from pathlib import Path as _Path

import jax.numpy as _jnp

from equigemma import variants as _variants
from equigemma._typing import typed as _typed
from equigemma.checkpoint._embedded import PACKAGES as _PACKAGES
from equigemma.checkpoint._embedded import embedded_file as _embedded_file
from equigemma.checkpoint._errors import CheckpointError as CheckpointError
from equigemma.checkpoint._gguf import load_gguf as _load_gguf
from equigemma.checkpoint._gguf import load_gguf_config as _load_gguf_config
from equigemma.config import ModelConfig as _ModelConfig
from equigemma.nn import Transformer as _Transformer
from equigemma.tokenizer import Tokenizer as _Tokenizer


@_typed
def load(
    source: str | _os.PathLike[str],
    *,
    dtype: _jnp.dtype | type | str = _jnp.bfloat16,
    progress: _Callable[[int, int, str], None] | None = None,
) -> tuple[_Transformer, _Tokenizer]:
    """A model with its weights, and its tokenizer.

    ```python
    >>> import equigemma as eg
    >>> model, tokenizer = eg.load("gemma3-270m")  # doctest: +SKIP

    ```

    **Arguments:**

    - `source`: `"gemma3-270m"`, whose weights a Python package carries, or the path of a `.gguf`
      file.
    - `dtype`: of every weight, and so of the activations: float32, bfloat16 or float16.
    - `progress`: called after each weight with the bytes loaded, those of the whole model, and the
      weight's path. Besides the model, no more than two of its largest weights are held in memory.

    **Raises:** `CheckpointError`, a `ValueError`, if there is nothing to load at `source`, or not a
    model that is known in every detail; `ImportError`, with the command that installs it, if a
    package is missing.
    """
    chosen = _weight_dtype(dtype)
    return _load_gguf(_find(source), dtype=chosen, progress=progress)


@_typed
def load_config(source: str | _os.PathLike[str]) -> _ModelConfig:
    """The config of what `load` would load, without its weights."""
    return _load_gguf_config(_find(source))


def _weight_dtype(dtype: _jnp.dtype | type | str) -> _jnp.dtype:
    with _suppress(TypeError):
        chosen = _jnp.dtype(dtype)
        if chosen in (_jnp.float32, _jnp.bfloat16, _jnp.float16):
            return chosen
    raise CheckpointError(f"Weights are loaded as float32, bfloat16 or float16, got dtype={dtype}.")


def _find(source: str | _os.PathLike[str]) -> _Path:
    """The file that a name or path stands for."""
    name = _os.fspath(source)
    if name.lower() in _PACKAGES:
        return _embedded_file(name.lower())
    path = _Path(name).expanduser()
    if path.is_file():
        return path
    accepted = f"{' or '.join(map(repr, _PACKAGES))}, or the path of a .gguf file"
    if path.is_dir():
        raise CheckpointError(f"{name!r} is a folder; load takes {accepted}.")
    if name.lower() in _variants.names():
        raise CheckpointError(
            f"The weights of {name} come with no package; load takes {accepted}. "
            f"equigemma.variants.get({name!r}) gives its config."
        )
    nearest = _get_close_matches(name.lower(), _PACKAGES, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}? It" if nearest else "it"
    raise CheckpointError(f"There is nothing to load at {name!r}; {hint} takes {accepted}.")
