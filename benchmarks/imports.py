"""What does `import equigemma` add to importing the libraries it stands on?

    python benchmarks/imports.py [--runs 9] [--write]

Every import is a process of its own, with and without equigemma by turns.
"""

import subprocess
import sys
import time

from report import Report, parser_of
from tables import ratios, spread, table


LIBRARIES = "import jax, equinox, jaxtyping, beartype, optax, numpy"
PACKAGE = "import equigemma"


def seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def main() -> None:
    options = parser_of(__doc__, runs=9).parse_args()
    report = Report(options, "jax", "equinox", "optax", "equigemma")
    # The first imports write byte code and fill the file cache.
    for code in (LIBRARIES, PACKAGE):
        seconds(code)
    pairs = [(seconds(LIBRARIES), seconds(PACKAGE)) for _ in range(options.runs)]
    without, with_ = zip(*pairs, strict=True)
    head = ["core libraries, s", "equigemma, s", "equigemma / core libraries, in pairs"]
    report.say(table(head, [map(spread, (without, with_, ratios(with_, without)))]))


if __name__ == "__main__":
    main()
