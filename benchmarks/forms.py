"""In which form does a product with one row read its weight fastest, under this version of JAX?

    python benchmarks/forms.py [--runs 5] [--write]

Chains of products, each in bfloat16 with a matrix of its own, `[2560, 640]`. GB/s of the weights as
they are stored, the fastest of twenty calls in each round. `kernel` is the one in C++; the others
are the portable forms of `_kernels/_forms.py`, whose table `MEASURED` is to name the fastest of
each column for every version of JAX: run it under each, on a quiet machine.
"""

import time
from functools import partial

from processes import answer, by_turns, in_a_process
from report import Report, parser_of
from tables import column, spread, table


STORED = ("float32", "bfloat16", "int8", "int8 groups", "int4 groups")
FORMS = ("kernel", "transposed", "dot", "summed")
OUTPUTS, INPUTS, COUNT, TIMES = 2560, 640, 40, 20


def measure(form: str) -> dict[str, float]:
    """GB/s by how weights are stored."""
    import os

    os.environ["EQUIGEMMA_NATIVE"] = "1" if form == "kernel" else "0"
    from equigemma._kernels import _forms

    if form != "kernel":
        names = dict.fromkeys(("float32", "bfloat16", "int8", "groups"), form)
        _forms.MEASURED[:] = [((0, 0), names)]
    return {stored: speed(stored) for stored in STORED}


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
    options = parser_of(__doc__, runs=5).parse_args()
    report = Report(options, "jax", "jaxlib")
    rounds = by_turns(options.runs, FORMS, lambda form: in_a_process("forms.py", form=form))

    def row(form: str) -> list[str]:
        return [form, *(spread(column(rounds, form, stored)) for stored in STORED)]

    report.say(table(["form", *STORED], map(row, FORMS)))


if __name__ == "__main__":
    answer(measure)
    main()
