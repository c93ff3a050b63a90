"""A prepared model gives what the plain one gives: every layout, any number of rows, every use."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

import equigemma as eg
from equigemma._kernels import LONGEST_ROW
from equigemma._prepare import JoinedProjection, MatrixEinsum, prepare
from equigemma.nn import AbstractEinsum, Einsum
from equigemma.nn._attention import SplitProjection


LENGTH = 11


def check_close(actual, expected) -> None:
    # Sums of a few units in float32, taken in another order, layer after layer.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


# Every layout of projections and gates, shared keys, keys that are values, and experts.
@pytest.fixture(scope="module", params=["gemma1 mha", "gemma3", "gemma3n", "gemma4 experts"])
def models(request) -> tuple[eg.Transformer, eg.Transformer]:
    model = tiny.model(tiny.CONFIGS[request.param])
    return model, prepare(model)


@pytest.fixture(scope="module")
def gemma3() -> tuple[eg.Transformer, eg.Transformer]:
    model = tiny.model(tiny.GEMMA3)
    return model, prepare(model)


def parts(model, kind: type) -> list:
    """All parts of a model that are of this kind, outermost first."""
    nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def first_block(model: eg.Transformer) -> Any:
    """The first layer, whatever it is made of."""
    return model.layers[0]


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_whole_texts_and_token_by_token(models):
    plain, prepared = models
    tokens = tiny.tokens(2, LENGTH)
    expected = tiny.run(plain, tokens).logits
    check_close(tiny.run(prepared, tokens).logits, expected)

    # One row takes another path than many.
    cache = tiny.empty_cache(plain.config, capacity=LENGTH)
    output = tiny.run_in_chunks(prepared, tokens[0], (LENGTH - 7, *[1] * 7), cache=cache)
    check_close(output.logits, expected[0])


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float64_as_the_plain_model(gemma3):
    plain, prepared = jax.tree.map(lambda leaf: tiny.host(leaf, jnp.bfloat16), gemma3)
    tokens = tiny.tokens(LENGTH)
    expected, _ = reference.forward(plain, tokens)
    cache = tiny.empty_cache(plain.config, capacity=LENGTH, dtype=jnp.bfloat16)

    def error(model) -> float:
        output = tiny.run_in_chunks(model, tokens, (LENGTH - 7, *[1] * 7), cache=cache)
        return float(np.sqrt(np.mean((np.asarray(output.logits) - expected) ** 2)))

    # Both round in the same places, from sums in different order: the errors are two draws.
    assert error(prepared) < 1.2 * error(plain)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("inputs", [LONGEST_ROW, LONGEST_ROW + 2, 2 * LONGEST_ROW + 5])
def test_wide_matrices_are_cut(rows, inputs):
    einsum = Einsum("...D,DF->...F", (inputs, 7), key=jax.random.key(0), dtype=jnp.dtype("float32"))
    prepared = prepare_part(einsum)
    assert len(prepared.matrices) == -(-inputs // LONGEST_ROW)
    x = tiny.normal(0, rows, inputs)
    expected = reference.wide(x) @ reference.wide(einsum.weight)
    # Sums of thousands of products, of variance one in all, in float32.
    np.testing.assert_allclose(jax.jit(prepared.__call__)(x), expected, rtol=0, atol=1e-5)


def prepare_part(part):
    """`prepare` of a model in which this part takes the place of the first projection."""
    model = tiny.model(tiny.GEMMA1_MQA)
    model = eqx.tree_at(lambda m: first_block(m).ffw.down, model, part)
    return first_block(prepare(model)).ffw.down


# --- what it is --------------------------------------------------------------------------------


def test_no_weight_is_left_as_it_was(models):
    plain, prepared = models
    # The experts of a mixture have an axis in common with their inputs.
    left = [einsum.eqn for einsum in parts(prepared, Einsum)]
    assert all("E" in eqn for eqn in left)
    assert sum(leaf.size for leaf in jax.tree.leaves(prepared)) == sum(
        leaf.size for leaf in jax.tree.leaves(plain)
    )
    assert prepared.embedding.weight is plain.embedding.weight
    assert prepared.config == plain.config


def test_projections_are_joined(gemma3):
    _, prepared = gemma3
    projection = first_block(prepared).attention.projection
    assert isinstance(projection, JoinedProjection)
    assert isinstance(projection.qkv, MatrixEinsum)
    assert [matrix.shape for matrix in projection.qkv.matrices] == [((6 + 3 + 3) * 10, tiny.WIDTH)]


def test_preparing_twice_changes_nothing(models):
    _, prepared = models
    assert eqx.tree_equal(prepare(prepared), prepared)


def test_shapes_without_arrays(models):
    plain, prepared = models
    shapes = eqx.filter_eval_shape(prepare, plain)
    assert jax.tree.structure(shapes) == jax.tree.structure(prepared)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(eqx.filter_eval_shape(lambda: prepared))


class Doubled(AbstractEinsum):
    """What wraps a weight: an adapter, say."""

    base: AbstractEinsum
    eqn: str = eqx.field(static=True)

    def __call__(self, x):
        return 2 * self.base(x)


def test_a_wrapped_weight_is_prepared_where_it_is(gemma3):
    plain, _ = gemma3
    wrapped = eqx.tree_at(
        lambda m: m.layers[0].attention.projection.q,
        plain,
        replace_fn=lambda q: Doubled(base=q, eqn=q.eqn),
    )
    prepared = prepare(wrapped)
    projection = first_block(prepared).attention.projection
    assert isinstance(projection, SplitProjection)
    assert isinstance(projection.q, Doubled) and isinstance(projection.q.base, MatrixEinsum)
    tokens = tiny.tokens(LENGTH)
    check_close(tiny.run(prepared, tokens).logits, tiny.run(wrapped, tokens).logits)


# --- what is done with it ----------------------------------------------------------------------


@pytest.mark.slow
def test_generates_the_same(gemma3):
    plain, prepared = gemma3
    expected, tokens = (
        eg.sampling.generate(model, tiny.tokens(7), max_new_tokens=13).tokens
        for model in (plain, prepared)
    )
    assert tokens.tolist() == expected.tolist()


def test_vmapped(gemma3):
    plain, prepared = gemma3
    tokens = tiny.tokens(3, 1)
    logits = jax.jit(jax.vmap(lambda t: prepared(t).logits))(tokens)
    check_close(logits, tiny.run(plain, tokens).logits)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 5])
def test_gradients(gemma3, length):
    plain, prepared = gemma3
    tokens = tiny.tokens(length)

    @jax.jit
    @jax.grad
    def gradient(model):
        return jax.nn.logsumexp(model(tokens).logits)

    expected, result = gradient(plain), gradient(prepared)
    check_close(result.embedding.weight, expected.embedding.weight)
    assert np.abs(result.embedding.weight).max() > 0.1
    of_gate, of_prepared_gate = (
        first_block(model).ffw.gate.matrices[0] for model in (prepare(expected), result)
    )
    check_close(of_prepared_gate, of_gate)
