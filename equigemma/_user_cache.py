"""The folder where files that can be made again are kept between runs."""

import os
import sys
from pathlib import Path


def user_cache() -> Path:
    """This library's folder in the user's cache; it may not exist yet.

    **Source:** the XDG Base Directory Specification, which also says that a relative
    `XDG_CACHE_HOME` is to be ignored; on macOS and Windows, the folders that those systems name.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if chosen.is_absolute():
        return chosen / "equigemma"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "equigemma"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "equigemma"
    return Path.home() / ".cache" / "equigemma"
