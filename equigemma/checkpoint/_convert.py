"""A checkpoint of one format to one of another, weight by weight, compared before it is there."""

import os
from pathlib import Path

import jax.numpy as jnp

from equigemma.checkpoint._compare import Loss, compare
from equigemma.checkpoint._open import find, open_checkpoint
from equigemma.checkpoint._save import plan_save
from equigemma.checkpoint._write import MAY_REPLACE, Format, write
from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._stored import Opened, Progress
from equigemma.checkpoint.gemma._orbax import open_orbax
from equigemma.checkpoint.gguf._leaves import with_full_table
from equigemma.checkpoint.gguf._read import open_gguf
from equigemma.checkpoint.gguf._vision import tower_path
from equigemma.checkpoint.gguf._write import Q8_0
from equigemma.checkpoint.hf._read import open_folder
from equigemma.checkpoint.native._folder import is_native


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: Format | None = None,
    dtype: jnp.dtype | type | str | None = None,
    revision: str | None = None,
    text_only: bool = False,
    shard_bytes: int = 5_000_000_000,
    force: bool = False,
    progress: Progress | None = None,
    check_progress: Progress | None = None,
) -> None:
    """Writes what `load` would read at `source` to `target`, as `save` would.

    One weight at a time is in memory, except for an Orbax folder, which takes all at once. Before
    it gets its name, everything is read back and compared with the source.

    **Arguments:** those of `load` and `save`. `dtype`: by default weights are kept as they are;
    packed ones of a GGUF file, and such of 64 bits, become float32. `force`: replace what is there
    already. `text_only`: the target has no vision tower, and
    one that lies beside a `.gguf` is not read. `progress`, `check_progress`: called while weights
    are written and while they are compared.

    **Raises:** `CheckpointError` as `load` and `save` do, and if the comparison fails.
    """
    if is_native(find(source, revision)):
        raise CheckpointError(
            f"{os.fspath(source)} holds a quantized model; load it and save it in another format."
        )
    opened = open_checkpoint(source, revision=revision, text_only=text_only)
    if any(layer.attention.mask_kind == "bidirectional" for layer in opened.model.config.layers):
        raise CheckpointError(
            f"{os.fspath(source)} is an embedder, and what comes after its model would be "
            "lost; load_embedder and save keep all of it."
        )
    place = Path(target).expanduser()
    if os.path.realpath(find(source, revision)) == os.path.realpath(place):
        raise CheckpointError(f"{place} is what is to be read; give another name to write to.")
    plan = plan_save(place, opened.tokenizer(), format=format, dtype=dtype)
    if not force:
        _check_free(place, plan.format)

    def check(*written: Path) -> None:
        loss = Loss(shifted_norms=plan.format == "gguf", packed_rows=plan.dtype == Q8_0)
        model = with_full_table(opened.model) if plan.format == "gguf" else opened.model
        compare(model, _reopen(plan.format, *written).model, loss, check_progress)

    write(opened.model, place, plan, shard_bytes=shard_bytes, progress=progress, check=check)


def _check_free(place: Path, format: Format) -> None:
    """Refuses to replace a model; what else is there `write` refuses in any case."""
    if format == "gguf":
        taken = [path for path in (place, tower_path(place)) if path.is_file()]
    else:
        entries = list(place.iterdir()) if place.is_dir() else []
        taken = [place] if entries and all(map(MAY_REPLACE[format], entries)) else []
    if taken:
        raise CheckpointError(
            f"{taken[0]} is there already; choose another name, or have it replaced with --force "
            "(force=True)."
        )


def _reopen(format: Format, path: Path, tower: Path | None = None) -> Opened:
    if format == "gguf":
        return open_gguf(path, tower)
    return open_folder(path) if format == "huggingface" else open_orbax(path, None)
