"""What a result was measured on, and how much memory a process took."""

import os
import platform
import resource
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from processes import answer, in_a_process


def describe_machine(*packages: str) -> str:
    """Processor, number of usable cores, memory, and versions of Python and of `packages`.

    A package that is not installed is left out.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, {_versions(*packages)}"


def versions_there(python: str, *packages: str) -> str:
    """The versions of `packages` in the environment of another Python."""
    return in_a_process("machine.py", python=python, packages=packages)["versions"]


def measure(packages: list[str]) -> dict:
    return {"versions": _versions(*packages)}


def peak_memory() -> float:
    """The most that this process ever held, in GB."""
    try:
        # From the kernel: getrusage also counts what the parent had before it started this.
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


def _versions(*packages: str) -> str:
    return ", ".join([f"Python {platform.python_version()}", *filter(None, map(_of, packages))])


def _of(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    answer(measure)
