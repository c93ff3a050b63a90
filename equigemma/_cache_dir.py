"""The user's cache directory (XDG)."""

import os
import sys
from pathlib import Path


def user_cache_dir() -> Path:
    """The folder `equigemma` in the user's cache folder, `XDG_CACHE_HOME` if that is set.

    It need not exist yet.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "equigemma"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "equigemma"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "equigemma" / "Cache"
    return Path.home() / ".cache" / "equigemma"
