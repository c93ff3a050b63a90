"""Products of a mixture of experts against NumPy in float64: values, derivatives, programs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from stablehlo import Operation, calls, exported

from equigemma._kernels import GroupedExperts, contract_experts, each_block, widened_groups
from equigemma._kernels._dense_experts import Dense
from equigemma._kernels._expert_blocks import block_rows, blocks_of, summed_over_blocks
from equigemma._kernels._expert_outer import expert_outer
from equigemma._kernels._ragged import ragged_outer


jit = partial(jax.jit, compiler_options=tiny.QUICK)

EXPERTS = 7
EQUATIONS = {
    "gate": ("...D,CFD->...CF", (160,), (2, 55, 160)),
    "down": ("...F,FD->...D", (160,), (160, 131)),
    "by output": ("...F,DF->...D", (160,), (131, 160)),
    "adapter": ("...D,CDr->...Cr", (160,), (2, 160, 64)),
    "backward": ("...CF,CFD->...D", (2, 55), (2, 55, 160)),
    "other order": ("...D,FDC->...CF", (160,), (55, 160, 2)),
}
equations = pytest.mark.parametrize("name", EQUATIONS)
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])


def numbers(seed: int, *shape: int, dtype=np.float32) -> jax.Array:
    rng = np.random.default_rng(seed)
    if dtype == jnp.int8:
        return jnp.asarray(rng.integers(-127, 128, shape).astype(np.int8))
    return tiny.host(rng.normal(size=shape), dtype)


def experts_of(rows: int, seed: int = 0) -> jax.Array:
    """In ascending order; not every expert has a row."""
    return tiny.host(np.sort(np.random.default_rng(seed).integers(1, EXPERTS, rows)), np.int32)


def of(name: str, rows: int, dtype, seed: int = 0) -> tuple[str, jax.Array, jax.Array, jax.Array]:
    eqn, inputs, weight = EQUATIONS[name]
    x = numbers(seed, rows, *inputs, dtype=jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)
    return eqn, x, numbers(seed + 1, EXPERTS, *weight, dtype=dtype), experts_of(rows)


def in_numpy(eqn: str, x, weight, expert) -> tuple[np.ndarray, np.ndarray]:
    """The products in float64, and those of absolute values: the size of what is added up."""
    x, chosen = np.asarray(x, np.float64), np.asarray(weight, np.float64)[np.asarray(expert)]
    each = "z" + eqn.replace("...", "").replace(",", ",z").replace("->", "->z")
    return np.einsum(each, x, chosen), np.einsum(each, abs(x), abs(chosen))


# On CPU the kernel for few rows, or single rows; then blocks of two, and of eight rows.
@equations
@dtypes
@pytest.mark.parametrize("rows", [1, 5, 29, 61])
def test_products(name, dtype, rows):
    eqn, x, weight, expert = of(name, rows, dtype)
    product = jit(partial(contract_experts, eqn, dtype=jnp.float32))(x, weight, expert)
    expected, size = in_numpy(eqn, x, weight, expert)
    assert np.all(abs(product - expected) < 2**-20 * size)  # a few roundings of each sum
    assert contract_experts(eqn, x, weight, expert).dtype == x.dtype


@equations
def test_products_on_an_accelerator(name):
    eqn, x, weight, expert = of(name, 29, jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        product = jit(Dense(eqn).ragged)(x, expert, weight)
    expected, size = in_numpy(eqn, x, weight, expert)
    assert np.all(abs(product - expected) < 2**-20 * size)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", ["native or blocks", "ragged"])
@pytest.mark.parametrize("rows", [1, 9, 61])
def test_products_in_groups(bits, form, rows):
    product = GroupedExperts(bits, 32, 160)
    x, expert = numbers(0, rows, 160), experts_of(rows)
    weight = numbers(1, EXPERTS, 211, 96 if bits == 4 else 160, dtype=jnp.int8)
    scale = numbers(2, EXPERTS, 211, 5, dtype=np.float16)
    call = product if form != "ragged" else lambda x, w, s, e: product.ragged(x, e, w, s)
    floats = widened_groups(weight, scale, bits, 32, 160)
    expected, size = in_numpy("...D,FD->...F", x, floats, expert)
    assert np.all(abs(jit(call)(x, weight, scale, expert) - expected) < 2**-20 * size)


def test_an_expert_that_is_not_there_is_the_last():
    eqn, x, weight, _ = of("gate", 2, jnp.float32)
    product = jit(partial(contract_experts, eqn))(x, weight, jnp.asarray([-3, 99]))
    expected = in_numpy(eqn, x, weight, [0, EXPERTS - 1])[0]
    np.testing.assert_allclose(product, expected, rtol=0, atol=1e-3)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        eqn, x, weight, expert = of("gate", 9, jnp.float32)
        x, weight = (y.astype(jnp.float64) for y in (x, weight))
        product = jit(partial(contract_experts, eqn))(x, weight, expert)
        assert product.dtype == jnp.float64
        np.testing.assert_allclose(product, in_numpy(eqn, x, weight, expert)[0], rtol=1e-12)


# --- derivatives and batches ---------------------------------------------------------------------


def plain(eqn: str, x, weight, expert):
    return jax.vmap(partial(jnp.einsum, eqn))(x, weight[expert])


@pytest.mark.parametrize("name", ["gate", "down", "by output"])
@pytest.mark.parametrize("rows", [2, pytest.param(29, marks=pytest.mark.slow)])
def test_derivatives(name, rows):
    eqn, x, weight, expert = of(name, rows, jnp.float32)
    dx, dw = numbers(5, *x.shape), numbers(6, *weight.shape)

    def derivatives(function, x, weight):
        def loss(x, weight):
            return jnp.sin(function(x, weight, expert) / 16).sum()

        gradient = jax.grad(loss, (0, 1))
        return {
            "grad": gradient(x, weight),
            "jvp": jax.jvp(loss, (x, weight), (dx, dw))[1],
            "jvp of x alone": jax.jvp(lambda x: loss(x, weight), (x,), (dx,))[1],
            "jvp of grad": jax.jvp(gradient, (x, weight), (dx, dw))[1],
            "grad of jvp": jax.grad(lambda x, w: jax.jvp(loss, (x, w), (dx, dw))[1], (0, 1))(
                x, weight
            ),
            "grads of a batch": jax.vmap(gradient, (0, None))(jnp.stack([x, dx]), weight),
            "remat": jax.grad(jax.checkpoint(loss), (0, 1))(x, weight),
        }

    with jax.numpy_dtype_promotion("standard"):
        ours, expected = (
            jit(partial(derivatives, partial(form, eqn)))(x, weight)
            for form in (contract_experts, plain)
        )
    for key, value in ours.items():
        for one, other in zip(jax.tree.leaves(value), jax.tree.leaves(expected[key]), strict=True):
            scale = np.abs(other).max()
            # Of single numbers: sums of hundreds, most of which cancel.
            limit = (1e-5 if np.ndim(other) else 1e-4) * scale
            np.testing.assert_allclose(one, other, rtol=0, atol=limit, err_msg=key)


def test_gradients_of_half_precision():
    eqn, x, weight, expert = of("gate", 29, jnp.bfloat16)
    cotangent = numbers(5, 29, 2, 55, dtype=jnp.bfloat16)

    def pull(form, x, weight):
        return jax.vjp(lambda x, w: form(eqn, x, w, expert), x, weight)[1](cotangent)

    ours = jit(partial(pull, contract_experts))(x, weight)
    wide = (y.astype(jnp.float32) for y in (x, weight))
    cotangent = cotangent.astype(jnp.float32)
    expected = jit(partial(pull, plain))(*wide)
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        # Each sum is rounded once, to eight digits.
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_derivatives_in_groups(bits):
    product = GroupedExperts(bits, 32, 160)
    x, expert = numbers(0, 9, 160), experts_of(9)
    weight = numbers(1, EXPERTS, 23, 96 if bits == 4 else 160, dtype=jnp.int8)
    scale = numbers(2, EXPERTS, 23, 5, dtype=np.float32).astype(jnp.float16)

    def loss(form, x, scale):
        return jnp.sin(form(x, scale) / 512).sum()

    def in_floats(x, scale):
        return plain("...D,FD->...F", x, widened_groups(weight, scale, bits, 32, 160), expert)

    def in_integers(x, scale):
        return product(x, weight, scale, expert)

    ours, expected = (
        jit(jax.grad(partial(loss, form), (0, 1)))(x, scale) for form in (in_integers, in_floats)
    )
    for one, other in zip(ours, expected, strict=True):
        # Those of scales are float16, of eleven digits.
        limit = 2**-10 * np.abs(np.asarray(other, np.float32)).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=limit)


@pytest.mark.parametrize("axes", [(0, None, None), (0, None, 0), (None, 0, None), (0, 0, 0)])
def test_batches(axes):
    eqn, x, weight, expert = of("gate", 9, jnp.float32)
    other = numbers(7, *x.shape), numbers(8, *weight.shape), experts_of(9, seed=3)
    pairs = zip((x, weight, expert), other, axes, strict=True)
    given = [one if axis is None else jnp.stack([one, two]) for one, two, axis in pairs]
    product = jit(jax.vmap(partial(contract_experts, eqn), axes))(*given)
    for index, row in enumerate(product):
        alone = [y if axis is None else y[index] for y, axis in zip(given, axes, strict=True)]
        np.testing.assert_allclose(row, in_numpy(eqn, *alone)[0], rtol=0, atol=1e-3)


def test_sums_of_outer_products():
    x, y, expert = numbers(0, 61, 5), numbers(1, 61, 3), experts_of(61)
    chosen = np.asarray(expert)[:, None] == np.arange(EXPERTS)
    expected = np.einsum("re,ri,ro->eio", *(np.asarray(a, np.float64) for a in (chosen, x, y)))
    for form in (expert_outer, ragged_outer):
        sums = jit(form, static_argnums=3)(x, y, expert, EXPERTS)
        np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-5)
    both = jit(jax.vmap(partial(expert_outer, experts=EXPERTS), (0, None, None)))
    stacked = both(jnp.stack([x, 2 * x]), y, expert)
    np.testing.assert_allclose(stacked, np.stack([expected, 2 * expected]), rtol=0, atol=1e-5)


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 9, 33, 301])
@pytest.mark.parametrize("same", [True, False], ids=["all the same", "random"])
def test_every_row_has_a_place_in_a_block_of_its_expert(rows, same):
    expert = np.full(rows, 3, np.int32) if same else np.asarray(experts_of(rows))
    blocks = jax.tree.map(np.asarray, jit(lambda e: blocks_of(e, EXPERTS))(jnp.asarray(expert)))
    size = blocks.row.shape[1]
    assert size == block_rows(rows, EXPERTS)
    assert len(set(blocks.place.tolist())) == rows
    np.testing.assert_array_equal(blocks.expert[blocks.place // size], expert)
    np.testing.assert_array_equal(blocks.row.ravel()[blocks.place], np.arange(rows))
    assert blocks.filled[blocks.place // size].all()
    # No block is computed for nothing.
    assert blocks.filled.sum() == len(set((blocks.place // size).tolist()))


def test_sizes_of_blocks():
    # 128 experts of which a token passes 8: decoding, small batches, a prompt, a long one.
    assert [block_rows(8 * tokens, 128) for tokens in (1, 16, 31, 32, 512, 8192)] == [
        1, 1, 1, 2, 32, 128,
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 61])
def test_each_block_sees_its_expert_alone(rows):
    x, expert = numbers(0, rows, 3), experts_of(rows)
    numbered = jnp.arange(float(EXPERTS))
    result = jit(partial(each_block, lambda rows, number: rows + number))(x, expert, numbered)
    np.testing.assert_array_equal(result, x + numbered[expert][:, None])
    sums = jit(partial(summed_over_blocks, lambda rows: rows.sum(axis=0)), static_argnums=1)(
        expert, EXPERTS, x
    )
    expected = np.zeros((EXPERTS, 3))
    np.add.at(expected, np.asarray(expert), np.asarray(x))
    np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-5)


# --- programs ------------------------------------------------------------------------------------


@equations
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_accelerators_have_no_loop_over_experts(name, platform):
    eqn, x, weight, expert = of(name, 29, jnp.bfloat16)

    def loss(x, weight):
        return jnp.square(contract_experts(eqn, x, weight, expert, jnp.float32)).sum()

    def program_of(function) -> list[Operation]:
        return exported(jax.jit(function), platform, x, weight)

    def grouped(program: list[Operation]) -> int:
        # With jax 0.8.1 a custom call, later a composite.
        return sum("chlo.ragged_dot" in (one.name, one.target) for one in program)

    forward, backward = program_of(loss), program_of(jax.grad(loss, (0, 1)))
    assert grouped(forward) > 0
    assert grouped(backward) == 3
    for program in (forward, backward):
        assert "while" not in {one.name for one in program}
        assert calls(program) == []


def test_where_the_kernel_is_called(kernel):

    def called(rows: int, size: int = 160) -> bool:
        eqn, x, weight, expert = of("by output", rows, jnp.bfloat16)
        x, weight = x[:, :size], weight[..., :size]
        program = jax.jit(partial(contract_experts, eqn)).lower(x, weight, expert)
        return "@equigemma_experts" in program.as_text()

    # Few rows of each expert, of weights that are worth a call.
    assert called(1) and called(32) and not called(33) and not called(1, size=100)


@pytest.mark.parametrize("rows", [1, 9])
def test_a_row_has_the_bits_of_a_product_with_its_expert_alone(rows, kernel):
    from equigemma._kernels import contract

    for name in ("gate", "down", "by output"):
        eqn, x, weight, expert = of(name, rows, jnp.bfloat16)
        together = jit(partial(contract_experts, eqn, dtype=jnp.float32))(x, weight, expert)
        alone = jit(partial(contract, eqn, dtype=jnp.float32))
        for row, number, result in zip(x, expert, together, strict=True):
            np.testing.assert_array_equal(result, alone(row, weight[number]))
