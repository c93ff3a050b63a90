"""Writing of checkpoints, for `save` and `convert`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp

from equigemma.checkpoint._open import read_extras
from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._extras import Extras
from equigemma.checkpoint.core._files import new_files, new_folder
from equigemma.checkpoint.core._plain import as_plain, as_plain_maps
from equigemma.checkpoint.core._stored import Progress
from equigemma.checkpoint.core._tokenizer_files import VocabularyTokenizer, write_tokenizer
from equigemma.checkpoint.gemma._orbax import is_part_of_orbax, write_orbax
from equigemma.checkpoint.gguf._vision import tower_path
from equigemma.checkpoint.gguf._write import write_gguf
from equigemma.checkpoint.hf._write import write_folder
from equigemma.checkpoint.native._folder import may_replace as may_replace_native
from equigemma.checkpoint.native._folder import write_native
from equigemma.checkpoint.sentence_transformers._write import (
    check_embedder,
    may_replace_embedder,
    write_modules,
)
from equigemma.embedding import Embedder
from equigemma.nn import Transformer


Format = Literal["huggingface", "gguf", "orbax", "orbax-flat", "equigemma"]


class Plan(NamedTuple):
    """What is to be written, all of it checked."""

    format: Format
    dtype: str | None
    tokenizer: VocabularyTokenizer | None


def write(
    model: Transformer | Embedder,
    target: Path,
    plan: Plan,
    *,
    shard_bytes: int,
    progress: Progress | None,
    check: Callable[..., None] | None = None,
) -> None:
    """Writes under another name, and renames if `check` of what was written raises nothing.

    The leaves of `model` may be in files still. `check` gets the path of what was written, and of a
    `.gguf` with a vision tower then that of the tower.
    """
    if shard_bytes < 1:
        raise CheckpointError(f"A file must have room for something, got {shard_bytes} bytes.")
    try:
        content = _content(model, plan)
        _check_content(content, plan.format)
        if plan.format == "gguf":
            # The tower first: a text model that is there has the one that it needs.
            with new_files(*_towers(content.model, target), target) as (*towers, partial):
                _write_files(content, partial, towers, plan.dtype, target.stem, progress)
                if check is not None:
                    check(partial, *towers)
        else:
            with new_folder(target, MAY_REPLACE[plan.format]) as partial:
                _write_folder(content, partial, plan, shard_bytes, progress)
                if check is not None:
                    check(partial)
    except CheckpointError as error:
        raise CheckpointError(f"{target} cannot be saved: {error}") from error


class _Content(NamedTuple):
    """All that goes into a checkpoint."""

    model: Transformer
    embedder: Embedder | None
    """What is around the model, if anything is."""
    tokenizer: VocabularyTokenizer | None
    extras: Extras


def _content(model: Transformer | Embedder, plan: Plan) -> _Content:
    embedder = model if isinstance(model, Embedder) else None
    model = model.model if isinstance(model, Embedder) else model
    if plan.format != "equigemma":
        if embedder is not None:
            dense = as_plain_maps(embedder.dense, model.dtype)
            embedder = eqx.tree_at(lambda e: e.dense, embedder, dense)
        model = as_plain(model)
    elif plan.dtype is not None or embedder is not None:
        raise CheckpointError(
            f"A folder of the format equigemma keeps a model, no embedder, as it is; got "
            f"dtype={plan.dtype}. Leave it out, or take another format."
        )
    origin = None if plan.tokenizer is None else plan.tokenizer.origin
    extras = Extras() if origin is None or not origin.exists() else read_extras(origin)
    return _Content(model, embedder, plan.tokenizer, extras)


def _check_content(content: _Content, format: Format) -> None:
    tokenizer, rows = content.tokenizer, content.model.config.vocab
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and the model's embedding only "
            f"{rows} rows."
        )
    if content.embedder is not None:
        check_embedder(content.embedder, format, tokenizer)


def _write_files(
    content: _Content,
    path: Path,
    towers: Sequence[Path],
    dtype: str | None,
    name: str,
    progress: Progress | None,
) -> None:
    assert content.tokenizer is not None  # plan_save saw to it
    write_gguf(
        content.model,
        path,
        tower=towers[0] if towers else None,
        dtype=dtype,
        tokenizer=content.tokenizer,
        extras=content.extras,
        name=name,
        progress=progress,
        embedder=content.embedder,
    )


def _write_folder(
    content: _Content, folder: Path, plan: Plan, shard_bytes: int, progress: Progress | None
) -> None:
    model, embedder, tokenizer, extras = content
    dtype = None if plan.dtype is None else jnp.dtype(plan.dtype)
    match plan.format:
        case "equigemma":
            write_native(model, folder, progress=progress)
        case "orbax" | "orbax-flat":
            is_flat = plan.format == "orbax-flat"
            write_orbax(model, folder, dtype=dtype, flat=is_flat, progress=progress)
        case _:
            write_folder(
                model,
                folder,
                dtype=dtype,
                shard_bytes=shard_bytes,
                special=None if tokenizer is None else tokenizer.special,
                extras=extras,
                progress=progress,
            )
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, extras)
    if embedder is not None and tokenizer is not None:
        write_modules(embedder, folder, dtype=dtype, tokenizer=tokenizer)


MAY_REPLACE: dict[Format, Callable[[Path], bool]] = {
    "equigemma": may_replace_native,
    "orbax": is_part_of_orbax,
    "orbax-flat": is_part_of_orbax,
    "huggingface": may_replace_embedder,
}
"""Whether a folder that is there may be replaced, for each format."""


def _towers(model: Transformer, target: Path) -> tuple[Path, ...]:
    """Where the vision tower of a `.gguf` goes, if the model has one."""
    tower = tower_path(target)
    if model.config.vision is not None:
        return (tower,)
    if tower.exists():
        raise CheckpointError(
            f"{tower.name} lies beside it and would be taken for the vision tower of this model, "
            "which has none; move it away, or choose another name."
        )
    return ()
