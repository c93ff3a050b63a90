"""What does `import equigemma` add to importing the libraries it stands on?

    python benchmarks/imports.py [--runs 9]

Every import is a process of its own, with and without equigemma by turns.
"""

import argparse
import statistics
import subprocess
import sys
import time

from machine import describe_machine


LIBRARIES = "import jax, equinox, jaxtyping, beartype, optax, numpy"
PACKAGE = "import equigemma"


def seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs

    # The first imports write byte code and fill the file cache.
    seconds(LIBRARIES), seconds(PACKAGE)
    pairs = [(seconds(LIBRARIES), seconds(PACKAGE)) for _ in range(runs)]
    without, with_ = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(one / other for other, one in pairs)

    print(describe_machine("jax", "equinox", "optax", "equigemma"))
    print(f"\n{runs} interleaved runs, median\n")
    print("| core libraries, s | equigemma, s | equigemma / core libraries, in pairs |")
    print("|---|---|---|")
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    print(f"| {without:.2f} | {with_:.2f} | {ratio} |")


if __name__ == "__main__":
    main()
