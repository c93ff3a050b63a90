"""What saves memory in training changes nothing else: one table, narrow products, checkpointing."""

from dataclasses import replace
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hlo import as_users_compile

import equigemma as eg
from equigemma import train
from equigemma._kernels import contract, in_place


@pytest.fixture(autouse=True, scope="module")
def promotion():
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        yield


def batch() -> train.Batch:
    rng = np.random.default_rng(1)
    texts = [train.Example(rng.integers(0, tiny.VOCAB, n), np.ones(n)) for n in (7, 4, 11, 2)]
    return next(train.pack(texts, length=11, rows=3))


def plain_loss(model, batch):
    """All logits at once, the table used twice."""
    logits = model(batch.tokens, positions=batch.positions, mask=batch.mask()).logits
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    return -jnp.sum(chosen * batch.weights), batch.weights.sum()


def value_and_grads(loss, model, **options):
    given = batch()
    return jax.jit(jax.value_and_grad(lambda model: loss(model, given, **options)[0]))(model)


def grads(loss, model, **options):
    return value_and_grads(loss, model, **options)[1]


@cache
def ordinary_grads():
    return grads(train.next_token_loss, tiny.model(tiny.GEMMA3))


def relative_error(tree, reference) -> float:
    """Length of the difference over the length of the reference."""
    left, right = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(part)])
        for part in (tree, reference)
    )
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


# With and without a softcap, and with a second table.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3n"])
def test_gradients_are_those_of_the_plain_loss(name):
    model = tiny.model(tiny.CONFIGS[name])
    ours = grads(train.next_token_loss, model, chunk=5)
    # Float32 sums in another order.
    assert relative_error(ours, grads(plain_loss, model)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["nothing", "dots_no_batch", "dots"])
def test_checkpointing_changes_nothing_but_what_is_kept(policy):
    model = tiny.model(tiny.GEMMA3)
    expected = ordinary_grads()
    ours = grads(train.next_token_loss, model, remat=policy)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    assert relative_error(ours, expected) < 1e-6


def test_the_less_a_policy_keeps_the_more_is_computed_again():
    def products(policy) -> int:
        loss = partial(train.next_token_loss, remat=policy)
        program = jax.make_jaxpr(jax.grad(lambda model: loss(model, batch())[0]))
        return str(program(tiny.model(tiny.GEMMA3))).count("dot_general")

    counts = [products(policy) for policy in ("nothing", "dots_no_batch", "dots", None)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[2] >= counts[3]


@pytest.mark.slow
def test_memory_grows_by_the_input_of_each_further_block():
    """And by the gradient of its weights, which are few here."""
    rows, length = 3, 127
    rng = np.random.default_rng(1)
    texts = [train.Example(rng.integers(0, tiny.VOCAB, length), np.ones(length))] * rows
    given = next(train.pack(texts, length=length, rows=rows))
    loss = partial(train.next_token_loss, remat="nothing")

    def temporary(layers: int) -> int:
        config = replace(tiny.GEMMA3, layers=tiny.GEMMA3.layers[:1] * layers)
        shapes = eqx.filter_eval_shape(partial(eg.Transformer, config), key=jax.random.key(0))
        grad = jax.jit(jax.grad(lambda model: loss(model, given)[0]))
        return as_users_compile(grad.lower(shapes)).memory_analysis().temp_size_in_bytes

    block_input = 4 * rows * length * tiny.WIDTH
    # Kept whole a block has ten arrays of this size or more, attention's weights apart.
    growth = (temporary(5) - temporary(3)) / 2
    assert growth < 2 * block_input, growth / block_input


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match="nothing, dots_no_batch, dots; got 'all'"):
        train.remat(tiny.model(tiny.GEMMA3), policy="all")


# Every kind of layer, stream and table.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gemma3n", "gemma4 experts"])
def test_float32_weights_compute_in_bfloat16_as_bfloat16_weights_do(name):
    wide = tiny.model(tiny.CONFIGS[name])
    # Weights that bfloat16 has: what is left is how they are used.
    narrow = jax.tree.map(lambda leaf: tiny.host(leaf, jnp.bfloat16), wide)
    wide = jax.tree.map(lambda leaf: tiny.host(leaf, jnp.float32), narrow)
    value, gradient = value_and_grads(train.next_token_loss, wide, compute_dtype=jnp.bfloat16)
    expected, usual = value_and_grads(train.next_token_loss, narrow)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    exact = grads(train.next_token_loss, wide)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}
    # No further from the truth than where the weights themselves are narrow; a tenth is chance.
    assert relative_error(gradient, exact) < 1.1 * relative_error(usual, exact)


EQUATIONS = {
    "...D,NDH->...NH": ((5, 11), (3, 11, 7)),
    "...D,CKDH->...CKH": ((2, 5, 11), (2, 3, 11, 7)),
    "...NH,NHD->...D": ((5, 3, 7), (3, 7, 11)),
    "...D,CFD->...CF": ((5, 11), (2, 13, 11)),
    "...F,FD->...D": ((13, 5), (5, 11)),
    "...Cr,CrKH->...CKH": ((5, 2, 3), (2, 3, 5, 7)),
}


@pytest.mark.parametrize("eqn", EQUATIONS)
def test_narrow_products_have_narrow_products_in_their_backward_pass(eqn):
    x_shape, weight_shape = EQUATIONS[eqn]
    x, weight = tiny.normal(1, *x_shape, dtype=jnp.bfloat16), tiny.normal(2, *weight_shape)
    shape = jax.eval_shape(partial(contract, eqn), x, weight).shape
    grad = tiny.normal(3, *shape, dtype=jnp.bfloat16)

    def backward(x, weight, grad):
        return jax.vjp(partial(contract, eqn), x, weight)[1](grad)

    of_x, of_weight = jax.jit(backward)(x, weight, grad)
    assert (of_x.dtype, of_weight.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = weight.astype(jnp.bfloat16)
    wide = [np.asarray(leaf, np.float64) for leaf in (x, rounded, grad)]
    ins, outs = eqn.split("->")
    left, right = ins.split(",")
    expected_x = np.einsum(f"{outs},{right}->{left}", wide[2], wide[1])
    batch_axes = "yz"[: len(x_shape) - len(left.removeprefix("..."))]
    left, outs = (axes.replace("...", batch_axes) for axes in (left, outs))
    expected_weight = np.einsum(f"{left},{outs}->{right}", wide[0], wide[2])
    # One rounding of the result to bfloat16; sums in float32 of products that are exact in it.
    np.testing.assert_allclose(np.asarray(of_x, np.float64), expected_x, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(of_weight, expected_weight, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_on_cpu_never_multiplies_widened_bfloat16():
    eqn, rows = "...D,CDF->...CF", 64
    x = jnp.zeros((rows, 128), jnp.bfloat16)
    weight = jnp.zeros((2, 128, 256))

    def backward(x, weight, grad):
        return jax.vjp(partial(contract, eqn), x, weight)[1](grad)

    grad = jnp.zeros((rows, 2, 256), jnp.bfloat16)
    program = as_users_compile(jax.jit(backward).lower(x, weight, grad)).as_text()
    products = [line for line in program.splitlines() if " dot(" in line]
    assert len(products) == 2
    # A product of bfloat16 is one that XLA has not converted its operands for.
    parameters = dict(
        line.strip().removeprefix("ROOT ").split(" = ", 1)
        for line in program.splitlines()
        if " = " in line
    )
    for product in products:
        operands = product.split(" dot(")[1].split(")")[0].split(", ")
        assert all(parameters[operand].startswith("bf16") for operand in operands), product


def test_updates_in_place_are_those_of_the_optimizer():
    model = {"a": tiny.normal(1, 5, 7), "b": tiny.normal(2, 3)}
    gradient = jax.tree.map(lambda leaf: tiny.host(np.square(leaf) - 0.1, np.float32), model)
    for optimizer in (
        optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.lion(0.01),
        optax.chain(optax.clip(0.2), optax.rmsprop(0.1)),
        optax.adamw(0.1, mu_dtype=jnp.bfloat16),
        optax.multi_transform(
            {"x": optax.adam(0.1), "y": optax.set_to_zero()}, {"a": "x", "b": "y"}
        ),
    ):
        state = jax.jit(optimizer.init)(model)
        ordinary = jax.jit(optimizer.update)
        program = in_place(optimizer.update, gradient, state, model)
        assert program is not None, "this one is known, and is not to be left to XLA"
        run = jax.jit(program.run)
        for _ in range(2):
            expected = ordinary(gradient, state, model)
            arguments = gradient, state, model
            ours = run(*arguments, jnp.array(True))
            assert jax.tree.structure(ours) == jax.tree.structure(expected)
            # The same formulas in other fusions.
            for left, right in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
                assert left.dtype == right.dtype
                np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)
            _, kept = run(*arguments, jnp.array(False))
            for left, right in zip(*map(jax.tree.leaves, (kept, state)), strict=True):
                np.testing.assert_array_equal(left, right)
            state = expected[1]


def test_a_step_needs_memory_for_one_gradient_and_no_more():
    """Beside weights and moments, which the new ones replace."""

    class Model(eqx.Module):
        weight: jax.Array

    def loss(model, batch):
        rows, table = train._tied.tied_lookup(model.weight, batch)
        return jnp.sum(jnp.sin(rows)) + jnp.vdot(table, table), jnp.float32(3)

    shape = jax.ShapeDtypeStruct((4096, 128), jnp.float32)
    optimizer = optax.adamw(0.1)
    state = eqx.filter_eval_shape(train.init, Model(shape), optimizer)
    step = train.make_step(loss, optimizer, max_grad_norm=1.0)
    lowered = jax.jit(step, donate_argnums=0).lower(state, jax.ShapeDtypeStruct((7,), jnp.int32))
    memory = as_users_compile(lowered).memory_analysis()
    size = 4 * 4096 * 128
    assert memory.alias_size_in_bytes >= 3 * size
    assert memory.temp_size_in_bytes < 1.1 * size
