"""Opening of checkpoints: the format is detected from a name or path."""

import os
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from equigemma import variants
from equigemma.checkpoint import _hub
from equigemma.checkpoint._bundled import PACKAGES, embedded_file
from equigemma.checkpoint.core._errors import CheckpointError, about
from equigemma.checkpoint.core._extras import Extras
from equigemma.checkpoint.core._layout import text_only as without_vision
from equigemma.checkpoint.core._stored import Opened
from equigemma.checkpoint.gemma._orbax import is_orbax, open_orbax, open_orbax_config
from equigemma.checkpoint.gguf._extras import gguf_extras
from equigemma.checkpoint.gguf._read import open_gguf, open_gguf_config
from equigemma.checkpoint.gguf._split import is_later_part
from equigemma.checkpoint.gguf._vision import is_tower
from equigemma.checkpoint.hf._extras import folder_extras
from equigemma.checkpoint.hf._read import CONFIG, open_folder, open_folder_config
from equigemma.checkpoint.native._folder import is_native, open_native, open_native_config
from equigemma.config import ModelConfig


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    config: ModelConfig | None = None,
    vision: str | os.PathLike[str] | None = None,
    text_only: bool = False,
) -> Opened:
    """The checkpoint at `source`, no weight of it read; the arguments are those of `load`."""
    path = find(source, revision)
    is_folder = path.is_dir()
    if is_folder and vision is not None:
        raise CheckpointError(
            f"{path} holds all that there is of its model; vision= goes with a .gguf file, got "
            f"{os.fspath(vision)}."
        )
    if is_folder and is_orbax(path):
        return _as_asked(open_orbax(path, config), text_only)
    if config is not None:
        raise CheckpointError(
            f"{path} says itself what its config is; config= is for Orbax folders, which may not."
        )
    if is_native(path):
        opened = open_native(path)
        if text_only and opened.model.config.vision is not None:
            raise CheckpointError(f"{path} is loaded as it was saved; leave text_only=True out.")
        return opened
    if is_folder:
        return open_folder(path, text_only=text_only)
    if text_only and vision is not None:
        raise CheckpointError(
            f"vision={os.fspath(vision)} and text_only=True contradict each other; leave one out."
        )
    pair = not text_only and _is_here(source)
    return open_gguf(path, _find_tower(vision, revision), pair=pair)


def open_config(source: str | os.PathLike[str], *, revision: str | None = None) -> ModelConfig:
    """The config of the checkpoint at `source`."""
    path = find(source, revision, config_only=True)
    if path.is_file():
        return open_gguf_config(path, pair=_is_here(source))
    if is_native(path):
        return open_native_config(path)
    return open_orbax_config(path) if is_orbax(path) else open_folder_config(path)


def _as_asked(opened: Opened, text_only: bool) -> Opened:
    return replace(opened, model=without_vision(opened.model)) if text_only else opened


def _is_here(source: str | os.PathLike[str]) -> bool:
    """Whether it is a path, beside which more may lie, rather than a name.

    What is beside a file in the cache of the hub depends on what else was ever asked for.
    """
    return os.fspath(source) != "" and Path(source).expanduser().exists()


def _find_tower(vision: str | os.PathLike[str] | None, revision: str | None) -> Path | None:
    if vision is None:
        return None
    if Path(vision).expanduser().is_dir():
        raise CheckpointError(f"vision={os.fspath(vision)} is a folder; name the .gguf file in it.")
    return find(vision, None if _is_here(vision) else revision)


def find(
    source: str | os.PathLike[str], revision: str | None = None, *, config_only: bool = False
) -> Path:
    """The file or folder that a name or path stands for."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    is_here = _is_here(source)
    if revision is not None and (is_here or not _hub.is_name(name)):
        raise CheckpointError(
            f"revision={revision!r} is for names on the hub, such as google/gemma-3-1b-it; got "
            f"{name!r}."
        )
    if name.lower() in PACKAGES:
        return embedded_file(name.lower())
    if is_here:
        is_ours = is_native(path) or is_orbax(path)
        if path.is_dir() and not (path / CONFIG).is_file() and not is_ours:
            return _only_file(path)
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


def _only_file(folder: Path) -> Path:
    """The `.gguf` file of a text model in a folder that holds no other checkpoint."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".gguf"]
    texts = [path for path in files if not is_tower(path) and not is_later_part(path.name)]
    if len(texts) > 1:
        raise CheckpointError(
            f"{folder} holds several .gguf files, {', '.join(path.name for path in texts)}; name "
            "the one to load."
        )
    if not texts:
        raise CheckpointError(
            f"{os.fspath(folder)!r} is a folder without {CONFIG} or Orbax's _METADATA, and without "
            "the .gguf file of a text model, so it is no checkpoint."
        )
    return texts[0]


def read_extras(path: Path) -> Extras:
    """The extras of a GGUF file, or of a folder in the layout of Hugging Face.

    **Raises:** `CheckpointError` if a file that is there is damaged.
    """
    with about(path):
        return gguf_extras(path) if path.is_file() else folder_extras(path)
