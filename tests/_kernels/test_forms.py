"""Products of one row where no kernel is built, and the programs that XLA on CPU makes of them."""

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hlo import as_users_compile, operations, read_by_vector_products

from equigemma._kernels import GroupedProduct, _forms, _native, contract
from equigemma._kernels._forms import FORMS, MEASURED, fastest


OUTPUTS, INPUTS = 211, 160
STORED = ["float32", "bfloat16", "int8", "int8 groups", "int4 groups"]
stored = pytest.mark.parametrize("kind", STORED)
on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="these are facts about XLA on CPU"
)


@pytest.fixture
def portable(monkeypatch):
    """As if there were no compiler."""
    monkeypatch.setattr(_native, "calls", lambda: None)
    jax.clear_caches()
    yield
    jax.clear_caches()


def weight_of(kind: str) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    if kind in ("float32", "bfloat16"):
        return (tiny.normal(0, OUTPUTS, INPUTS, dtype=jnp.dtype(kind)),)
    columns = INPUTS // 2 + 16 if kind == "int4 groups" else INPUTS
    weight = jnp.asarray(rng.integers(-127, 128, (OUTPUTS, columns)).astype(np.int8))
    return (weight,) if kind == "int8" else (weight, tiny.normal(1, OUTPUTS, 5, dtype=jnp.float16))


def product_of(kind: str):
    if "groups" in kind:
        return GroupedProduct(4 if "int4" in kind else 8, 32, INPUTS)
    return lambda x, weight: contract("...D,FD->...F", x, weight, jnp.float32)


@stored
def test_products_without_a_kernel(portable, kind):
    weight, x = weight_of(kind), tiny.normal(2, 2, INPUTS)
    product = product_of(kind)
    program = jax.jit(product, compiler_options=tiny.QUICK)
    assert "equigemma_" not in program.lower(x[0], *weight).as_text()
    expected = program(x, *weight)
    for row, one in zip(x, expected, strict=True):
        # Sums of up to some thousands in float32, ordered otherwise.
        np.testing.assert_allclose(program(row, *weight), one, rtol=0, atol=4e-3)


@on_cpu
@stored
def test_a_loop_reads_weights_as_they_are_stored(portable, kind):
    if kind == "int4 groups" and fastest("groups") is not _forms.transposed:
        pytest.skip("no form is known yet that this version does not write floats for")
    weight, row = weight_of(kind), jnp.ones(INPUTS, jnp.bfloat16)
    product = product_of(kind)

    @jax.jit
    def decode(row, weight):
        def step(row):
            y = product(row, *weight)[:INPUTS]
            return (y / (1 + jnp.abs(y).max())).astype(row.dtype)

        return jax.lax.while_loop(lambda row: row.max() > 0.5, step, row)

    written = operations(as_users_compile(decode.lower(row, weight)))
    sizes = {OUTPUTS * INPUTS, weight[0].size}
    assert len(written) > 2
    assert [one for one in written if one.size in sizes] == []


@on_cpu
@pytest.mark.skipif(fastest("bfloat16") is not _forms.transposed, reason="another form runs here")
def test_a_product_with_one_row_reads_a_vector(portable):
    # Heads that become a vector within the product make it ten times as slow.
    (weight,) = weight_of("bfloat16")

    @jax.jit
    def mixed(heads, weight):
        return contract("...NH,DNH->...D", heads * 2, weight.reshape(-1, 5, 32), jnp.float32)

    program = as_users_compile(mixed.lower(jnp.ones((1, 5, 32), jnp.bfloat16), weight))
    rows = [shape for shape in read_by_vector_products(program) if math.prod(shape) != weight.size]
    assert rows != []
    assert [shape for shape in rows if max(shape) != math.prod(shape)] == []


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_product(name):
    (matrix,), row = weight_of("bfloat16"), tiny.normal(2, INPUTS, dtype=jnp.bfloat16)
    form = partial(FORMS[name], lambda y: y.astype(jnp.float32))
    expected = np.asarray(matrix, np.float32) @ np.asarray(row, np.float32)
    product = jax.jit(form, compiler_options=tiny.QUICK)((matrix,), row)
    np.testing.assert_allclose(product, expected, rtol=0, atol=1e-4)


def test_the_choice_is_that_of_the_newest_measurement():
    assert fastest("int8", (0, 8, 1)) is fastest("int8", (0, 10, 2)) is _forms.transposed
    assert fastest("int8", (0, 11, 0)) is fastest("int8", (0, 12, 0)) is _forms.summed
    assert fastest("float16", (0, 12, 0)) is fastest("bfloat16", (0, 12, 0))
    assert all(name in FORMS for _, names in MEASURED for name in names.values())


MEASUREMENTS = Path(__file__).parents[2] / "benchmarks" / "results" / "forms.json"


@pytest.mark.skipif(not MEASUREMENTS.exists(), reason="measurements are only in the repository")
@pytest.mark.parametrize("kind", STORED)
def test_the_choice_is_the_fastest_that_was_measured(kind):
    measured = json.loads(MEASUREMENTS.read_text(encoding="utf-8"))
    assert len(measured) >= 3
    for version, speeds in measured.items():
        numbers = tuple(int(part) for part in version.split(".")[:3])
        chosen = fastest("groups" if "groups" in kind else kind, numbers).__name__
        best = max(speeds[kind][name] for name in FORMS)
        # Rounds of one form differ by as much.
        assert speeds[kind][chosen] >= 0.8 * best, (version, chosen, speeds[kind])
