"""Forward mode, second derivatives and `vmap` of what has a backward pass of its own.

The backward passes themselves are tested where they are, and their programs in `test_compiled`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, PartitionSpec

import equigemma as eg
from equigemma._kernels import contract, linear_map


jit = partial(jax.jit, compiler_options=tiny.QUICK)

PRODUCTS = [
    ("...D,CFD->...CF", (3, 7), (2, 5, 7)),
    ("...NH,NHD->...D", (3, 2, 3), (2, 3, 7)),
    ("...ED,EFD->...EF", (3, 2, 7), (2, 5, 7)),
]


def whole(seed: int, *shape: int, dtype) -> jax.Array:
    """Small whole numbers: their products and sums are exact in every dtype."""
    return tiny.host(np.random.default_rng(seed).integers(-3, 4, shape), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("eqn", "x_shape", "weight_shape"), PRODUCTS)
def test_derivatives_of_a_product_of_half_precision(eqn, x_shape, weight_shape):
    def derivatives(function, dtype):
        x, dx, weight, dw = (
            whole(seed, *shape, dtype=dtype)
            for seed, shape in enumerate((x_shape, x_shape, weight_shape, weight_shape))
        )

        def loss(x, weight):
            return jnp.square(function(x, weight)).sum() / 2

        at, along = (x, weight), (dx, dw)
        linearized = jax.linearize(function, *at)[1]
        return {
            "jvp": jax.jvp(function, at, along)[1],
            "jvp of x alone": jax.jvp(lambda x: function(x, weight), (x,), (dx,))[1],
            "linearize": linearized(*along),
            "jacfwd": jax.jacfwd(function, (0, 1))(*at),
            "vmap of jvp": jax.vmap(lambda dx: jax.jvp(function, at, (dx, dw))[1])(
                jnp.stack([dx, 2 * dx])
            ),
            "jvp of vmap": jax.jvp(jax.vmap(function, (None, 0)), *map(_twice, (at, along)))[1],
            "grad of vmap": jax.grad(
                lambda w: jax.vmap(function, (0, None))(jnp.stack([x, dx]), w).sum()
            )(weight),
            "jvp of jvp": jax.jvp(lambda *at: jax.jvp(function, at, along)[1], at, along)[1],
            "jvp of grad": jax.jvp(jax.grad(loss, (0, 1)), at, along)[1],
            "grad of jvp": jax.grad(lambda *at: jax.jvp(loss, at, along)[1], (0, 1))(*at),
            "grad of grad": jax.grad(lambda x: (jax.grad(loss)(x, weight) * dx).sum())(x),
        }

    def _twice(pair):
        return pair[0], jnp.stack([pair[1], pair[1] + pair[1]])

    with jax.numpy_dtype_promotion("standard"):
        half = jit(
            lambda: derivatives(lambda x, w: contract(eqn, x, w, jnp.float32), jnp.bfloat16)
        )()
        wide = jit(lambda: derivatives(partial(jnp.einsum, eqn), jnp.float32))()
    for name in half:
        for one, other in zip(
            jax.tree.leaves(half[name]), jax.tree.leaves(wide[name]), strict=True
        ):
            # Only what is larger than 256 is ever rounded, to a bfloat16 of 8 bits.
            np.testing.assert_allclose(
                one.astype(jnp.float32), other, rtol=2**-7, atol=1e-6, err_msg=name
            )


def test_an_integer_weight_has_no_tangent():
    x, weight = whole(0, 3, 7, dtype=jnp.bfloat16), whole(1, 5, 7, dtype=jnp.int8)
    product = partial(contract, "...D,FD->...F")
    _, tangent = jax.jvp(lambda x: product(x, weight), (x,), (x,))
    np.testing.assert_array_equal(tangent, product(x, weight))


def test_a_map_is_transposed_as_it_was_told():
    def scaled(factor, x):
        return factor * x

    def wrong_on_purpose(factor, cotangent):
        return 5 * factor * cotangent

    @jax.custom_jvp
    def function(factor, x):
        return factor * x

    @partial(function.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        factor, x = primals
        y = function(factor, x)
        return y, linear_map(scaled, wrong_on_purpose, factor, tangents[1], like=y)

    x, three = jnp.arange(4.0), jnp.full(4, 3.0)
    of_x = partial(function, three)
    assert jax.jvp(of_x, (x,), (x,))[1].tolist() == [0, 3, 6, 9]
    assert jax.vjp(of_x, x)[1](x)[0].tolist() == [0, 15, 30, 45]
    both = jax.vmap(jax.grad(lambda scale, x: (function(scale, x)).sum(), 1), (None, 0))
    assert both(three, jnp.stack([x, x])).tolist() == [[15, 15, 15, 15]] * 2
    shared = jax.grad(lambda x: jax.vmap(function, (0, None))(jnp.stack([three, three]), x).sum())
    assert shared(x).tolist() == [30, 30, 30, 30]


@pytest.mark.parametrize("devices", ["a", None])
def test_gradients_within_and_through_shard_map(devices):
    x, weight = whole(0, 3, 7, dtype=jnp.bfloat16), whole(1, 5, 7, dtype=jnp.bfloat16)
    mesh, spec = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,)), PartitionSpec(devices)

    def loss(x, weight):
        return jnp.square(contract("...D,FD->...F", x, weight, jnp.float32)).sum()

    def total(x, weight):
        here = loss(x, weight)
        return here if devices is None else jax.lax.psum(here, devices)

    shard = partial(jax.shard_map, mesh=mesh, in_specs=(spec, PartitionSpec()))
    within = shard(jax.grad(loss, (0, 1)), out_specs=(spec, PartitionSpec()))
    through = jax.grad(shard(total, out_specs=PartitionSpec()), (0, 1))
    expected = jit(jax.grad(loss, (0, 1)))(x, weight)
    for sharded in (within, through):
        for one, other in zip(jit(sharded)(x, weight), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gemma3n", "gemma4 small", "gemma4 experts"])
def test_forward_mode_of_a_model_in_half_precision(name):
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.model(tiny.CONFIGS[name]))
    tangent = jax.tree.map(
        lambda leaf: tiny.normal(leaf.size, *leaf.shape, dtype=leaf.dtype), model
    )
    cotangent = tiny.normal(1, 5, tiny.VOCAB)
    tokens = tiny.tokens(5)

    @jit
    def both(model):
        def logits(model):
            return model(tokens).logits

        _, forward = jax.jvp(logits, (model,), (tangent,))
        _, pull = jax.vjp(logits, model)
        return forward, pull(cotangent)[0]

    forward, backward = both(model)
    along = sum(
        np.vdot(np.asarray(one, np.float64), np.asarray(other, np.float64))
        for one, other in zip(jax.tree.leaves(tangent), jax.tree.leaves(backward), strict=True)
    )
    # Two ways to the same number, each with some hundred roundings to 8 bits.
    size = np.linalg.norm(np.asarray(forward)) * np.linalg.norm(np.asarray(cotangent))
    assert abs(np.vdot(forward, cotangent) - along) < 0.03 * size
    # And in size and direction it is the derivative in float32.
    wide, moved = (
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree) for tree in (model, tangent)
    )
    exact = jit(lambda: jax.jvp(lambda model: model(tokens).logits, (wide,), (moved,))[1])()
    assert np.linalg.norm(forward - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.slow
def test_a_hessian_times_a_vector_of_a_model_in_half_precision():
    def product(dtype):
        model, along = (
            jax.tree.map(
                lambda leaf: leaf.astype(jnp.bfloat16).astype(dtype), tiny.model(tiny.GEMMA3, seed)
            )
            for seed in (0, 1)
        )

        @jit
        def along_itself(model, along):
            def loss(model):
                return jax.nn.log_softmax(model(tiny.tokens(5)).logits)[..., 3].sum()

            return jax.jvp(jax.grad(loss), (model,), (along,))[1]

        leaves = jax.tree.leaves(along_itself(model, along))
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])

    half, exact = product(jnp.bfloat16), product(jnp.float32)
    assert np.linalg.norm(half - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.slow
def test_stacked_layers_in_forward_mode():
    layers = tiny.GEMMA3.layers
    model = tiny.model(tiny.model_config(*layers, *layers))
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    tokens = tiny.tokens(5)

    def tangent(model):
        return jax.jvp(lambda model: model(tokens).logits, (model,), (model,))[1]

    ours, expected = jit(tangent)(eg.stack(model)), jit(tangent)(model)
    assert np.linalg.norm(ours - expected) < 0.02 * np.linalg.norm(expected)
