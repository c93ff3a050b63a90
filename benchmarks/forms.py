"""In which form does a product with one row read its weight fastest, under which version of JAX?

    python benchmarks/forms.py [--runs 5] [--pythons PATH ...] [--write]

Chains of products, each in bfloat16 with a matrix of its own, `[2560, 640]`. GB/s of the weights as
they are stored, the fastest of twenty calls in each round. `kernel` is the one in C++; the others
are the portable forms of `_kernels/_forms.py`, whose table `MEASURED` is to name the fastest of
each column for every version of JAX. `--pythons` names those of environments with other versions,
which take turns with this one. With `--write` the medians are kept in `results/forms.json` too,
which a test holds `MEASURED` against.
"""

import json
import statistics
import sys
import time
from functools import partial

from processes import answer, by_turns, in_a_process
from report import Report, parser_of, write
from tables import column, spread, table


STORED = ("float32", "bfloat16", "int8", "int8 groups", "int4 groups")
FORMS = ("kernel", "transposed", "dot", "summed")
OUTPUTS, INPUTS, COUNT, TIMES = 2560, 640, 40, 20


def measure(form: str) -> dict:
    """GB/s by how weights are stored, and the version of JAX."""
    import os

    os.environ["EQUIGEMMA_NATIVE"] = "1" if form == "kernel" else "0"
    import jax

    from equigemma._kernels import _forms

    if form != "kernel":
        names = dict.fromkeys(("float32", "bfloat16", "int8", "groups"), form)
        _forms.MEASURED[:] = [((0, 0), names)]
    return {stored: speed(stored) for stored in STORED} | {"jax": jax.__version__}


def speed(stored: str) -> float:
    import jax
    import jax.numpy as jnp

    from equigemma._kernels import GroupedProduct, contract

    weights = [weight(stored, seed) for seed in range(COUNT)]
    product = partial(contract, "...D,FD->...F", dtype=jnp.float32)
    if "groups" in stored:
        product = GroupedProduct(4 if "int4" in stored else 8, 32, INPUTS)

    @jax.jit
    def chain(x, weights):
        for each in weights:
            x = x + product(x, *each)[:INPUTS].astype(x.dtype) / OUTPUTS
            x = x / (1 + jnp.abs(x).max())
        return x

    x, seconds = jnp.ones(INPUTS, jnp.bfloat16), []
    for _ in range(TIMES + 1):
        started = time.perf_counter()
        chain(x, weights).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / min(seconds) / 1e9


def weight(stored: str, seed: int) -> tuple:
    import jax.numpy as jnp
    import numpy as np

    from equigemma.quantize._int4_groups import int4_groups
    from equigemma.quantize._int8_groups import int8_groups

    rows = np.random.default_rng(seed).normal(size=(OUTPUTS, INPUTS)).astype(np.float32)
    if stored == "int8":
        return (jnp.asarray(np.clip(30 * rows, -127, 127).astype(np.int8)),)
    if "groups" in stored:
        groups = (int4_groups if "int4" in stored else int8_groups)(jnp.asarray(rows), 32)
        return groups.weight, groups.scale
    return (jnp.asarray(rows, stored),)


def main() -> None:
    parser = parser_of(__doc__, runs=5)
    parser.add_argument(
        "--pythons", nargs="+", default=[], metavar="PATH", help="those of other environments"
    )
    options = parser.parse_args()
    report = Report(options, "jaxlib")
    pythons = [sys.executable, *options.pythons]
    sides = {f"{form} {at}": (form, each) for at, each in enumerate(pythons) for form in FORMS}

    def run(side: str) -> dict:
        form, python = sides[side]
        return in_a_process("forms.py", python=python, form=form)

    rounds, kept = by_turns(options.runs, sides, run), {}
    for at in range(len(pythons)):
        names = {form: f"{form} {at}" for form in FORMS}
        version = rounds[0][names["kernel"]]["jax"]
        report.say(f"jax {version}:\n")
        rows = (
            [form, *(spread(column(rounds, side, stored)) for stored in STORED)]
            for form, side in names.items()
        )
        report.say(table(["form", *STORED], rows))
        kept[version] = {
            stored: {
                form: round(statistics.median(column(rounds, side, stored)), 2)
                for form, side in names.items()
            }
            for stored in STORED
        }
    if options.write:
        path = options.write / "results" / "forms.json"
        write(path, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    answer(measure)
    main()
