"""What a name or path stands for: the format is found out, and the checkpoint opened."""

import os
from difflib import get_close_matches
from pathlib import Path

from equigemma import variants
from equigemma.checkpoint import _hub
from equigemma.checkpoint._embedded import PACKAGES, embedded_file
from equigemma.checkpoint._errors import CheckpointError
from equigemma.checkpoint._gguf import open_gguf, open_gguf_config
from equigemma.checkpoint._hf import CONFIG, open_folder, open_folder_config
from equigemma.checkpoint._orbax import is_orbax, open_orbax, open_orbax_config
from equigemma.checkpoint._stored import Opened
from equigemma.config import ModelConfig


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    config: ModelConfig | None = None,
) -> Opened:
    """The checkpoint at `source`, no weight of it read; the arguments are those of `load`."""
    path = find(source, revision)
    if path.is_dir() and is_orbax(path):
        return open_orbax(path, config)
    if config is not None:
        raise CheckpointError(
            f"{path} says itself what its config is; config= is for Orbax folders, which may not."
        )
    return open_gguf(path) if path.is_file() else open_folder(path)


def open_config(source: str | os.PathLike[str], *, revision: str | None = None) -> ModelConfig:
    """The config of the checkpoint at `source`."""
    path = find(source, revision, config_only=True)
    if path.is_file():
        return open_gguf_config(path)
    return open_orbax_config(path) if is_orbax(path) else open_folder_config(path)


def find(
    source: str | os.PathLike[str], revision: str | None = None, *, config_only: bool = False
) -> Path:
    """The file or folder that a name or path stands for."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    is_here = path.exists() and name != ""
    if revision is not None and (is_here or not _hub.is_name(name)):
        raise CheckpointError(
            f"revision={revision!r} is for names on the hub, such as google/gemma-3-1b-it; got "
            f"{name!r}."
        )
    if name.lower() in PACKAGES:
        return embedded_file(name.lower())
    if is_here:
        if path.is_dir() and not (path / CONFIG).is_file() and not is_orbax(path):
            raise CheckpointError(
                f"{name!r} is a folder without {CONFIG} or Orbax's _METADATA, so it is no "
                "checkpoint."
            )
        return path
    if _hub.is_name(name):
        return _hub.download(name, revision, config_only=config_only)
    accepted = (
        f"{' or '.join(map(repr, PACKAGES))}, a name on the hub such as google/gemma-3-1b-it, or "
        "the path of a .gguf file or a folder"
    )
    if name.lower() in variants.names():
        raise CheckpointError(
            f"The weights of {name} come with no package; load takes {accepted}. "
            f"equigemma.variants.get({name!r}) gives its config."
        )
    nearest = get_close_matches(name.lower(), PACKAGES, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}? It" if nearest else "it"
    raise CheckpointError(f"There is nothing to load at {name!r}; {hint} takes {accepted}.")
