"""Files and folders that appear whole or not at all.

Everything is written under another name beside the target and renamed when it is done. A process
that is killed on the way leaves the old file or folder as it was; what it had written stays under a
name that begins with a dot and ends in `.partial`, and can be deleted.
"""

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from equigemma.checkpoint.core._errors import CheckpointError


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` if the block ends without an error.

    **Raises:** `CheckpointError` if `target` is a folder, or if something cannot be written.
    """
    with new_files(target) as (partial,):
        yield partial


@contextmanager
def new_files(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """The same for files that belong together: once all are written, they are renamed in order."""
    targets = tuple(Path(os.path.realpath(target)) for target in targets)
    partials = tuple(map(_partial, targets))
    with _explained(targets[-1]):
        for target in targets:
            if target.is_dir():
                raise CheckpointError(f"{target} is a folder; give the name of a file.")
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partials
            for partial in partials:
                _sync(partial)
            for partial, target in zip(partials, targets, strict=True):
                os.replace(partial, target)
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write to, which becomes `target` if the block ends without an error.

    A folder that is there already is replaced as a whole, so it must hold nothing of anybody
    else's.

    **Arguments:** `may_replace`: whether an entry of the folder that is there may be lost.

    **Raises:** `CheckpointError` if `target` is no folder, or holds something that may not be lost,
    or if something cannot be written.
    """
    target = Path(os.path.realpath(target))
    partial = _partial(target)
    with _explained(target):
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target} is a file; give the name of a folder.")
        _check_replaceable(target, may_replace)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    _sync(path)
            # Once more: hours may have passed.
            _check_replaceable(target, may_replace)
            _take_the_place_of(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(target: Path, may_replace: Callable[[Path], bool]) -> None:
    entries = sorted(target.iterdir()) if target.is_dir() else []
    if kept := [entry.name for entry in entries if not may_replace(entry)]:
        raise CheckpointError(
            f"{target} holds {kept[0]}, which is no part of a checkpoint and would be lost; choose "
            "a new folder, or move it away."
        )


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from error


def _sync(path: Path) -> None:
    """Has the content on disk before the name is: otherwise a power cut could leave it empty."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _take_the_place_of(new: Path, old: Path) -> None:
    """`new` gets the name of `old`; what had it is left under the name of `new`."""
    if not old.exists():
        os.rename(new, old)
    elif not any(old.iterdir()):
        old.rmdir()
        os.rename(new, old)
    elif not _exchange(new, old):
        # No system call for it here: for an instant neither has the name.
        aside = _partial(old)
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise
        os.rename(aside, new)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; False where the system or the file system cannot."""
    swap = ctypes.c_uint(2)  # RENAME_EXCHANGE, and RENAME_SWAP
    paths = os.fsencode(first), os.fsencode(second)
    try:
        system = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            here = ctypes.c_int(-100)  # AT_FDCWD
            failed = system.renameat2(here, paths[0], here, paths[1], swap)
        elif sys.platform == "darwin":
            failed = system.renamex_np(*paths, swap)
        else:
            return False
    except (AttributeError, TypeError):
        return False
    code = ctypes.get_errno()
    if failed and code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(second))
    return not failed
