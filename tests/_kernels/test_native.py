"""The C++ kernel: its bits, its place in programs, and how it is built."""

import logging
import shutil
import stat
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma._kernels import GroupedProduct, _native, _product, contract


jit = partial(jax.jit, compiler_options=tiny.QUICK)


# --- bits: the same sums in NumPy, number by number --------------------------------------------


def fused(a, b, c) -> np.ndarray:
    """a · b + c, rounded once: numbers of few digits are added without error in float64."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def halved(lanes: np.ndarray) -> np.ndarray:
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def padded(x: np.ndarray, size: int) -> np.ndarray:
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])


def by_output(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """16 partial sums: numbers j, j + 16, ... of a row add to sum j."""
    x, weight = (padded(y, 32) for y in (x, weight))
    lanes = np.zeros((len(x), len(weight), 16), np.float32)
    for at in range(0, x.shape[1], 16):
        lanes = fused(weight[:, at : at + 16], x[:, None, at : at + 16], lanes)
    return halved(lanes)


def in_groups(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, halves: int) -> np.ndarray:
    """Sums of two products, then one with the scale: a group of each half by turns."""
    size = x.shape[1] // halves
    lanes = np.zeros((len(x), len(weight), 16), np.float32)
    for group in range(0, size, 32):
        for first in range(group, x.shape[1], size):
            sums = np.zeros_like(lanes)
            for at in (first, first + 16):
                sums = fused(weight[:, at : at + 16], x[:, None, at : at + 16], sums)
            lanes = fused(scale[:, first // 32, None], sums, lanes)
    return halved(lanes)


def by_input(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    sums = np.zeros((len(x), weight.shape[1]), np.float32)
    for i in range(x.shape[1]):
        sums = fused(weight[i], x[:, i, None], sums)
    return sums


def numbers(seed: int, *shape: int, dtype) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == jnp.int8:
        return rng.integers(-127, 128, shape).astype(np.int8)
    # Of eight digits, whatever they are stored in.
    return rng.normal(size=shape).astype(jnp.bfloat16).astype(dtype)


STORED = [jnp.float32, jnp.bfloat16, jnp.int8]
stored = pytest.mark.parametrize("dtype", STORED, ids=["f32", "bf16", "int8"])
# Whole blocks and a rest, on one thread and on several.
sizes = pytest.mark.parametrize(("inputs", "outputs"), [(128, 64), (197, 211), (13, 5)])
rows_of = pytest.mark.parametrize("rows", [1, 3, 31])


@stored
@sizes
@rows_of
def test_sums_of_rows(kernel, dtype, inputs, outputs, rows):
    x = numbers(0, rows, inputs, dtype=np.float32)
    weight = numbers(1, outputs, inputs, dtype=dtype)
    product = _product.call("equigemma_product", x, weight, outputs=outputs, each=1)
    expected = by_output(x, weight.astype(np.float32))
    np.testing.assert_array_equal(product, expected)


@stored
@sizes
@rows_of
def test_sums_of_columns(kernel, dtype, inputs, outputs, rows):
    x = numbers(0, rows, inputs, dtype=np.float32)
    weight = numbers(1, 3, inputs, outputs, dtype=dtype)
    product = _product.call("equigemma_product", x, weight, outputs=3 * outputs, each=outputs)
    expected = [by_input(x, matrix.astype(np.float32)) for matrix in weight]
    np.testing.assert_array_equal(product, np.concatenate(expected, axis=1))


@pytest.mark.parametrize("groups", [1, 2, 5, 8])
@rows_of
def test_sums_of_bytes_in_groups(kernel, groups, rows):
    x = numbers(0, rows, 32 * groups, dtype=np.float32)
    weight = numbers(1, 211, 32 * groups, dtype=jnp.int8)
    scale = numbers(2, 211, groups, dtype=np.float16)
    scale[:2] = [[2**-24], [-(2**-15) * 1.75]]  # below the smallest normal float16
    product = _product.call("equigemma_int8_groups", x, weight, scale, outputs=211)
    expected = in_groups(x, weight, scale.astype(np.float32), 1)
    np.testing.assert_array_equal(product, expected)


@pytest.mark.parametrize("groups", [2, 6, 8])
@rows_of
def test_sums_of_nibbles_in_groups(kernel, groups, rows):
    x = numbers(0, rows, 32 * groups, dtype=np.float32)
    nibbles = np.random.default_rng(1).integers(-8, 8, (211, 32 * groups)).astype(np.int8)
    scale = numbers(2, 211, groups, dtype=np.float16)
    lower, upper = np.split(nibbles, 2, axis=1)
    packed = (lower & 15) | (upper << 4)
    product = _product.call("equigemma_int4_groups", x, packed, scale, outputs=211)
    expected = in_groups(x, nibbles, scale.astype(np.float32), 2)
    np.testing.assert_array_equal(product, expected)


# --- bits of bfloat16 activations: whole numbers, whose sums have no rounding in any order --------


def whole_numbers(seed: int, *shape: int, dtype, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(-size, size, shape).astype(dtype)


def from_python(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x.astype(np.int64) @ weight.astype(np.int64).T


@stored
@sizes
@rows_of
def test_whole_numbers_of_rows(kernel, dtype, inputs, outputs, rows):
    x = whole_numbers(0, rows, inputs, dtype=jnp.bfloat16)
    weight = whole_numbers(1, outputs, inputs, dtype=dtype, size=128)
    by_output = _product.call("equigemma_product", x, weight, outputs=outputs, each=1)
    np.testing.assert_array_equal(by_output, from_python(x, weight))
    columns = np.ascontiguousarray(weight.T)[None]
    by_input = _product.call("equigemma_product", x, columns, outputs=outputs, each=outputs)
    np.testing.assert_array_equal(by_input, from_python(x, weight))


@pytest.mark.parametrize("inputs", [32, 160, 237])
@rows_of
def test_whole_numbers_in_groups(kernel, inputs, rows):
    x = whole_numbers(0, rows, inputs, dtype=jnp.bfloat16)
    weight = whole_numbers(1, 211, inputs, dtype=np.int8, size=128)
    scale = whole_numbers(2, 211, -(-inputs // 32), dtype=np.float16)
    wide = weight * np.repeat(scale.astype(np.int64), 32, axis=1)[:, :inputs]
    product = _product.call("equigemma_int8_groups", x, weight, scale, outputs=211)
    np.testing.assert_array_equal(product, from_python(x, wide))


@pytest.mark.parametrize("inputs", [32, 160, 237])
@rows_of
def test_whole_numbers_in_groups_of_nibbles(kernel, inputs, rows):
    x = whole_numbers(0, rows, inputs, dtype=jnp.bfloat16)
    groups = -(-inputs // 32)
    nibbles = whole_numbers(1, 211, -(-groups // 2) * 64, dtype=np.int8)
    scale = whole_numbers(2, 211, groups, dtype=np.float16)
    wide = nibbles[:, :inputs] * np.repeat(scale.astype(np.int64), 32, axis=1)[:, :inputs]
    lower, upper = np.split(nibbles, 2, axis=1)
    packed = (lower & 15) | (upper << 4)
    product = _product.call("equigemma_int4_groups", x, packed, scale, outputs=211)
    np.testing.assert_array_equal(product, from_python(x, wide))


# --- programs ----------------------------------------------------------------------------------

PRODUCTS = [
    ("...D,FD->...F", (197,), (211, 197)),
    ("...D,CDF->...CF", (131,), (2, 131, 73)),
    ("...NH,NHD->...D", (3, 41), (3, 41, 139)),
]
products = pytest.mark.parametrize(("eqn", "x_shape", "weight_shape"), PRODUCTS)


@products
@stored
@pytest.mark.parametrize("batch", [(), (1,), (2, 4)])
def test_a_product_of_few_rows(eqn, x_shape, weight_shape, dtype, batch):
    x = numbers(0, *batch, *x_shape, dtype=jnp.bfloat16)
    weight = numbers(1, *weight_shape, dtype=dtype)
    product = jit(lambda x, w: contract(eqn, x, w, jnp.float32))(x, weight)
    expected = np.einsum(eqn, x.astype(np.float64), weight.astype(np.float64))
    size = np.einsum(eqn, abs(x.astype(np.float64)), abs(weight.astype(np.float64)))
    # A few roundings of each sum, however it is ordered.
    assert np.all(abs(product - expected) < 2**-20 * size)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_of_few_rows_with_integers_in_groups(bits):
    x = numbers(0, 2, 5 * 32, dtype=np.float32)
    weight = numbers(1, 257, 3 * 32 if bits == 4 else 5 * 32, dtype=jnp.int8)
    scale = numbers(2, 257, 5, dtype=np.float16)
    product = GroupedProduct(bits, 32, 5 * 32)
    assert product.has_kernel(x, weight, scale)
    expected = product.reference(x, weight, scale)
    # Sums of some thousands in float32, ordered otherwise.
    close = partial(np.testing.assert_allclose, rtol=0, atol=2e-3)
    close(jit(product)(x, weight, scale), expected)
    close(jit(product.portable)(x[0], weight, scale), expected[0])


def weights_and_rows() -> tuple[jax.Array, jax.Array]:
    x, weight = numbers(0, 5, 197, dtype=jnp.bfloat16), numbers(1, 211, 197, dtype=jnp.bfloat16)
    return jnp.asarray(x), jnp.asarray(weight)


def product_of(x: jax.Array, weight: jax.Array) -> jax.Array:
    return contract("...D,FD->...F", x, weight, jnp.float32)


def text_of(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).as_text()


def test_a_row_does_not_see_others(kernel):
    x, weight = weights_and_rows()
    together = jit(product_of)(x, weight)
    apart = jit(jax.vmap(product_of, (0, None)))(x, weight)
    np.testing.assert_array_equal(together, apart)
    one = jit(product_of)
    np.testing.assert_array_equal(together, [one(row, weight) for row in x])


def test_where_the_kernel_is_called(kernel):
    x, weight = weights_and_rows()
    called = partial(str.__contains__, text_of(product_of, x, weight))
    assert called("equigemma_product")
    assert "equigemma_product" in text_of(jax.vmap(product_of, (0, None)), x, weight)
    # A batch of weights, many rows, and a weight so small that a call would take as long.
    assert "equigemma" not in text_of(jax.vmap(product_of), x, jnp.stack([weight] * 5))
    many = jnp.zeros((_product.FEW + 1, 197), jnp.bfloat16)
    assert "equigemma" not in text_of(product_of, many, weight)
    assert "equigemma" not in text_of(product_of, x, weight[:3])


@pytest.mark.parametrize("rows", [1, 5])
def test_derivatives_are_those_of_many_rows(rows):
    x, weight = weights_and_rows()
    x, cotangent = x[:rows], jnp.asarray(numbers(2, rows, 211, dtype=np.float32))

    def derivatives(function, x, weight):
        y, pull = jax.vjp(function, x, weight)
        _, tangent = jax.jvp(function, (x, weight), (x, weight))
        second = jax.grad(lambda x: jax.jvp(function, (x, weight), (x, weight))[1].sum())(x)
        return y, pull(cotangent), tangent, second

    few = jit(partial(derivatives, product_of))(x, weight)
    wide = partial(jnp.einsum, "zd,fd->zf", preferred_element_type=jnp.float32)
    many = jit(partial(derivatives, wide))(x, weight)
    for one, other in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        # Gradients are bfloat16, of eight digits, from cotangents rounded to as many.
        one, other = (np.asarray(y, np.float32) for y in (one, other))
        assert np.abs(one - other).max() < 0.01 * np.abs(other).max()


def test_programs_for_other_machines_do_not_call_it():
    x, weight = weights_and_rows()
    for platform in ("cpu", "cuda", "tpu"):
        exported = jax.export.export(jax.jit(product_of), platforms=[platform])(x, weight)
        assert "equigemma_product" not in exported.mlir_module()
    both = jax.export.export(jax.jit(product_of), platforms=["cpu", "cuda"])(x, weight)
    np.testing.assert_allclose(both.call(x, weight), product_of(x, weight), atol=1e-3)


def test_all_threads_at_once(kernel):
    x, weight = weights_and_rows()
    program = jit(lambda x, w: product_of(x, jnp.concatenate([w] * 8)))
    expected, wrong = np.asarray(program(x, weight)), []

    def repeat():
        wrong.extend(n for n in range(20) if (program(x, weight) != expected).any())

    threads = [threading.Thread(target=repeat) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads) and wrong == []


# --- building ----------------------------------------------------------------------------------


def decided_anew():
    return _native._calls.__wrapped__()


def test_it_can_be_turned_off(monkeypatch, caplog):
    monkeypatch.setenv("EQUIGEMMA_NATIVE", "0")
    assert decided_anew() is None
    assert caplog.records == []


def test_without_a_compiler_one_sentence_says_so(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("EQUIGEMMA_NATIVE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING, "equigemma"):
        assert decided_anew() is None
    (record,) = caplog.records
    assert "there is no C++ compiler" in record.message and "EQUIGEMMA_NATIVE=0" in record.message


needs_a_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs c++")


@needs_a_compiler
def test_a_compiler_that_fails_leaves_nothing(monkeypatch, caplog, tmp_path):
    source = tmp_path / "wrong.cc"
    source.write_text("#error not today\n")
    monkeypatch.setenv("EQUIGEMMA_NATIVE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_native, "SOURCE", source)
    with caplog.at_level(logging.WARNING, "equigemma"):
        assert decided_anew() is None
    assert "not today" in caplog.text
    folder = tmp_path / "equigemma" / "kernels"
    assert list(folder.iterdir()) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@needs_a_compiler
def test_a_library_is_built_once_for_each_source(monkeypatch, tmp_path):
    source = tmp_path / "right.cc"
    monkeypatch.setattr(_native, "SOURCE", source)
    built = []
    for text in ("int one;", "int one;", "int two;"):
        source.write_text(text)
        built.append(_native.built(tmp_path / "kernels"))
    assert built[0] == built[1] != built[2]
    assert sorted((tmp_path / "kernels").iterdir()) == sorted(set(built))


def test_a_folder_that_others_write_to_is_not_loaded_from(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="others can write to"):
        _native.built(tmp_path)
