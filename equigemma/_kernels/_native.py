"""The kernel in C++, `few_rows.cc`, built on this machine for this machine.

It is built when a program for CPU is first compiled that can use it, which takes a C++ compiler and
some seconds; the user's cache folder keeps it for this version of jaxlib and this processor. A
process decides once. `EQUIGEMMA_NATIVE=0` does without.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax

from equigemma._cache_dir import user_cache_dir


SOURCE = Path(__file__).with_name("few_rows.cc")
CALLS = tuple(
    f"equigemma_{name}"
    for name in (
        *("product", "int8_groups", "int4_groups"),
        *("experts", "experts_int8_groups", "experts_int4_groups"),
    )
)
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
PATIENCE = 120
"""Seconds after which a compiler is given up."""

_building = threading.Lock()


def calls() -> Mapping[str, str] | None:
    """What is registered for each of `CALLS`; None where there is no kernel."""
    with _building:
        return _calls()


@cache
def _calls() -> Mapping[str, str] | None:
    if os.environ.get("EQUIGEMMA_NATIVE", "1") == "0":
        return None
    try:
        path = built(user_cache_dir() / "kernels")
        library = ctypes.CDLL(str(path))
        # A program that JAX keeps on disk names what it calls.
        names = {call: f"{call}_{path.stem.split('-')[1]}" for call in CALLS}
        for call, name in names.items():
            capsule = jax.ffi.pycapsule(getattr(library, call))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logging.getLogger("equigemma").warning(
            "Decoding on CPU is slower than it could be: the C++ kernel was not built (%s). "
            "EQUIGEMMA_NATIVE=0 does without it, and without this sentence.",
            _reason(error),
        )
        return None
    return names


def built(folder: Path) -> Path:
    """The shared library in `folder`, built if it is not there.

    **Raises:** `OSError` or `subprocess.SubprocessError` if it cannot be built.
    """
    target = folder / f"few_rows-{_key()}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(folder)
    if target.is_file():
        return target
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{target.name}.")
    os.close(handle)
    try:
        include = ("-isystem", jax.ffi.include_dir())
        command = [_compiler(), *FLAGS, *include, str(SOURCE), "-o", temporary]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return target


def _key() -> str:
    parts = [SOURCE.read_bytes(), *FLAGS, version("jaxlib"), sys.platform, *_processor()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _processor() -> tuple[str, ...]:
    """What the machine can do, as far as it says so without a compiler."""
    named = (platform.machine(), platform.processor())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return named
    kinds = ("flags", "Features", "model name")
    return (*named, *sorted({line for line in lines if line.startswith(kinds)}))


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise FileNotFoundError("there is no C++ compiler; CXX can name one")


def _check_owner(folder: Path) -> None:
    """What is loaded from here runs as part of this process."""
    if not hasattr(os, "getuid"):
        return
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"others can write to {folder}; XDG_CACHE_HOME chooses another")


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return lines[0] if lines else f"the compiler ended with {error.returncode}"
    return str(error)
