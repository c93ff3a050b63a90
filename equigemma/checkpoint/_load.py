"""Reading of checkpoints: `load` and its kin."""

import os as os
from collections.abc import Callable as Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jax as jax
import jax.numpy as jnp

from equigemma._prepare import prepare
from equigemma._typing import typed
from equigemma.checkpoint._open import find, open_checkpoint, open_config, read_extras
from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._stored import (
    Progress,
    Transform,
    put_on_device,
    shapes_on_device,
)
from equigemma.checkpoint.gguf._quantized import keep_blocks
from equigemma.checkpoint.sentence_transformers._read import load_embedder as _load_embedder
from equigemma.config import ModelConfig
from equigemma.embedding import Embedder
from equigemma.nn import Transformer
from equigemma.quantize import GroupwiseEmbedding, Int8Embedding
from equigemma.tokenizers import Tokenizer


_Few = GroupwiseEmbedding | Int8Embedding


@typed
def load(
    source: str | os.PathLike[str],
    *,
    dtype: jnp.dtype | type | str = jnp.bfloat16,
    revision: str | None = None,
    config: ModelConfig | None = None,
    vision: str | os.PathLike[str] | None = None,
    text_only: bool = False,
    quantized: bool = False,
    transform: Transform | None = None,
    sharding: Any = None,
    progress: Progress | None = None,
    on_shapes: Callable[[Transformer, Tokenizer], object] | None = None,
) -> tuple[Transformer, Tokenizer]:
    """A model with its weights, and its tokenizer.

    ```python
    >>> import equigemma as eg
    >>> model, tokenizer = eg.load("gemma3-270m")  # doctest: +SKIP

    ```

    **Arguments:**

    - `source`: `"gemma3-270m"`, whose weights a Python package carries; a name on the Hugging Face
      hub, such as `"google/gemma-3-1b-it"` or `"owner/name/file.gguf"`; or the path of a `.gguf`
      file, of a folder with one or with `config.json` and `.safetensors` files, or of an Orbax
      folder. Of a Gemma 3 that reads images, llama.cpp has the vision tower in a second file:
      `mmproj-NAME.gguf` beside `NAME.gguf`, or the only `*mmproj*.gguf` there, is taken for it.
    - `dtype`: of every weight, and so of the activations: float32, bfloat16 or float16.
    - `revision`: for a name on the hub, a branch, tag or commit.
    - `config`: for an Orbax folder that keeps none and is not a known variant.
    - `vision`: the file of the vision tower of a `.gguf`, if it lies elsewhere, or as a name on the
      hub.
    - `text_only`: leave out a vision tower, of which nothing is read then.
    - `quantized`: keep the 8-bit blocks of a `.gguf` in Q8_0 as they are, integers and scales, and
      compute with them: the model is prepared for decoding, like one of `quantize.int8`.
    - `transform`: applied to each part of the model, such as the embedding or a layer, as soon as
      its weights are read, where the model as a whole would take more memory:
      `transform=eg.prepare` gives `eg.prepare` of the model without a plain one beside it, and
      likewise `quantize.int8` and `quantize.int4`.
    - `sharding`: where the weights go: a device, a `jax.sharding.Sharding`, or a tree of these with
      the structure of the model.
    - `progress`: called after each weight with the bytes loaded, those of the whole model, and the
      weight's path. Besides the model, no more than two of its largest weights are held in memory.
    - `on_shapes`: called before any weight is read with the model that will come, which has a
      `jax.ShapeDtypeStruct` for every array, and the tokenizer. A thread that it starts can
      compile for that model in the meantime: `jax.jit(function).lower(shapes, ...).compile()`.

    **Returns:** the model, and the tokenizer of its vocabulary.

    **Raises:** `CheckpointError`, a `ValueError`, if there is nothing to load at `source`, or not a
    model that is known in every detail, or if it has no tokenizer; `ImportError`, with the command
    that installs it, if a package is missing.
    """
    chosen = _weight_dtype(dtype)
    opened = open_checkpoint(
        source, revision=revision, config=config, vision=vision, text_only=text_only
    )
    # The tokenizer first: what is wrong with it shows before minutes of reading.
    tokenizer = opened.tokenizer()
    if tokenizer is None:
        raise CheckpointError(
            f"{os.fspath(source)} has weights but no tokenizer; put its tokenizer.json or "
            "tokenizer.model there, or take the weights alone with checkpoint.load_model."
        )
    model, transform = _in_form(opened.model, chosen, quantized, transform)
    if on_shapes is not None:
        on_shapes(shapes_on_device(model, chosen, transform), tokenizer)
    return put_on_device(model, chosen, sharding, progress, transform), tokenizer


@typed
def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: jnp.dtype | type | str = jnp.bfloat16,
    revision: str | None = None,
    config: ModelConfig | None = None,
    vision: str | os.PathLike[str] | None = None,
    text_only: bool = False,
    quantized: bool = False,
    transform: Transform | None = None,
    sharding: Any = None,
    progress: Progress | None = None,
) -> Transformer:
    """The model that `load` would give, of a checkpoint that need not have a tokenizer.

    **Arguments:** those of `load`, but for `on_shapes`.

    **Returns:** the model.
    """
    chosen = _weight_dtype(dtype)
    opened = open_checkpoint(
        source, revision=revision, config=config, vision=vision, text_only=text_only
    )
    model, transform = _in_form(opened.model, chosen, quantized, transform)
    return put_on_device(model, chosen, sharding, progress, transform)


@typed
def load_embedder(
    source: str | os.PathLike[str],
    *,
    dtype: jnp.dtype | type | str = jnp.bfloat16,
    revision: str | None = None,
    progress: Progress | None = None,
) -> tuple[Embedder, Tokenizer]:
    """A text-embedding model, such as `"google/embeddinggemma-300m"`, for `embed`.

    **Arguments:** `source`: a folder in the layout of `sentence-transformers`, a `.gguf` file of
    llama.cpp with its linear maps, or the name of either on the Hugging Face hub; the others are
    those of `load`.

    **Returns:** the embedder, and its tokenizer.

    **Raises:** what `load` raises.
    """
    return _load_embedder(source, _weight_dtype(dtype), revision, progress)


@typed
def load_config(source: str | os.PathLike[str], *, revision: str | None = None) -> ModelConfig:
    """The config of what `load` would load, without its weights.

    **Arguments:** `source`, `revision`: those of `load`.

    **Returns:** the config.
    """
    return open_config(source, revision=revision)


@typed
def load_chat_template(
    source: str | os.PathLike[str], *, revision: str | None = None
) -> str | None:
    """How a model wants conversations spelled, for `chat.Template`; None: it does not say.

    Models that were not trained to answer have none.

    **Arguments:** `source`, `revision`: those of `load`.

    **Returns:** a template in Jinja's language, or None.
    """
    return read_extras(find(source, revision)).chat_template


def _in_form(
    model: Transformer, dtype: jnp.dtype, quantized: bool, transform: Transform | None
) -> tuple[Transformer, Transform | None]:
    """The opened model in the form in which it is read, and what is applied to its parts."""
    # As it was saved; only what is not quantized may have another dtype.
    model = jax.tree.map(
        lambda part: replace(part, activations=dtype) if isinstance(part, _Few) else part,
        model,
        is_leaf=lambda part: isinstance(part, _Few),
    )
    if not quantized or isinstance(model.embedding, _Few):
        return model, transform

    def prepared(part: Any) -> Any:
        return prepare(part) if transform is None else transform(prepare(part))

    return keep_blocks(model, dtype), prepared


def _weight_dtype(dtype: jnp.dtype | type | str) -> jnp.dtype:
    with suppress(TypeError):
        chosen = jnp.dtype(dtype)
        if chosen in (jnp.float32, jnp.bfloat16, jnp.float16):
            return chosen
    raise CheckpointError(f"Weights are loaded as float32, bfloat16 or float16, got dtype={dtype}.")
