"""The mixture of experts against the dense expansion, and what its program reads."""

import re
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from hlo import as_users_compile, operations

import equigemma as eg
from equigemma._kernels import _native
from equigemma.config import MoEConfig
from equigemma.nn._moe import Experts, Router
from equigemma.quantize import int8


FLOAT = jnp.dtype(jnp.float32)
# Sums of a dozen products of about unit size in float32, in another order.
CLOSE = dict(rtol=1e-5, atol=1e-5)
WIDTH, CONFIG = 11, MoEConfig(num_experts=7, num_experts_per_token=3, hidden_dim=5)


def experts(config: MoEConfig = CONFIG, dtype=FLOAT) -> Experts:
    shapes = eqx.filter_eval_shape(Experts, WIDTH, config, key=jax.random.key(0), dtype=dtype)
    return jax.tree.map(lambda leaf: 0.5 * tiny.normal(leaf.size, *leaf.shape), shapes)


def choices(rows: int, config: MoEConfig = CONFIG, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Experts for each row, none twice, and weights."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((rows, config.num_experts)), axis=-1)[
        :, : config.num_experts_per_token
    ]
    weights = rng.random((rows, config.num_experts_per_token))
    return tiny.host(order, np.int32), tiny.host(weights, np.float32)


@eqx.filter_jit
def dense(module: Experts, x, chosen, weights) -> jax.Array:
    """The reference form: every row through every expert, and all but the chosen counted as 0."""
    count = module.down.weight.shape[0]
    outputs = module.all(jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], count, x.shape[-1])))
    share = (jax.nn.one_hot(chosen, count) * weights[..., None]).sum(axis=-2)
    return jnp.einsum("...e,...ed->...d", share, outputs)


apply = eqx.filter_jit(lambda module, *arguments: module(*arguments))


# Blocks of one row, of two, of sixteen, and several blocks for each expert.
@pytest.mark.parametrize("rows", [1, 2, 5, 37, 401])
def test_equals_the_dense_expansion(rows):
    module, x = experts(), tiny.normal(0, rows, WIDTH)
    chosen, weights = choices(rows)
    expected = dense(module, x, chosen, weights)
    np.testing.assert_allclose(apply(module, x, chosen, weights), expected, **CLOSE)


def test_all_rows_may_want_the_same_experts():
    module, x = experts(), tiny.normal(0, 37, WIDTH)
    chosen = jnp.broadcast_to(jnp.asarray([6, 0, 3], jnp.int32), (37, 3))
    weights = choices(37)[1]
    np.testing.assert_allclose(
        apply(module, x, chosen, weights), dense(module, x, chosen, weights), **CLOSE
    )


def test_any_rank_and_vmapped():
    module, x = experts(), tiny.normal(0, 6, WIDTH)
    chosen, weights = choices(6)
    expected = np.asarray(dense(module, x, chosen, weights)).reshape(2, 3, WIDTH)
    x, chosen, weights = (np.asarray(a).reshape(2, 3, -1) for a in (x, chosen, weights))
    arrays = [jnp.asarray(array) for array in (x, chosen, weights)]
    np.testing.assert_allclose(apply(module, *arrays), expected, **CLOSE)
    np.testing.assert_allclose(jax.jit(jax.vmap(module))(*arrays), expected, **CLOSE)
    one = [jnp.asarray(array[0, 0]) for array in (x, chosen, weights)]
    np.testing.assert_allclose(apply(module, *one), expected[0, 0], **CLOSE)


def test_vmapped_over_models():
    module, x = experts(), tiny.normal(0, 3, WIDTH)
    chosen, weights = choices(3)
    other = jax.tree.map(lambda leaf: tiny.normal(leaf.size + 1, *leaf.shape), module)
    both = jax.tree.map(lambda a, b: jnp.asarray(np.stack([a, b])), module, other)
    mapped = eqx.filter_jit(eqx.filter_vmap(lambda m: m(x, chosen, weights)))(both)
    for index, alone in enumerate((module, other)):
        expected = dense(alone, x, chosen, weights)
        np.testing.assert_allclose(np.asarray(mapped)[index], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 37], ids=["single rows", "blocks"])
def test_gradients_both_ways(rows):
    module, x = experts(), tiny.normal(0, rows, WIDTH)
    chosen, weights = choices(rows)

    def loss(form, module, x, weights):
        return jnp.sin(form(module, x, chosen, weights)).sum()

    def sparse(module, *arguments):
        return module(*arguments)

    arguments = module, x, weights
    gradients, expected = (
        jax.jit(jax.grad(lambda *a: loss(form, *a), argnums=(0, 1, 2)))(*arguments)
        for form in (sparse, dense)
    )
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)  # sums over all rows

    tangents = jax.tree.map(lambda leaf: tiny.normal(leaf.size + 1, *leaf.shape), arguments)
    grad = jax.jit(lambda a, t: jax.jvp(lambda *a: loss(sparse, *a), a, t))(arguments, tangents)[1]
    backward = sum(
        float(jnp.vdot(g, t))
        for g, t in zip(jax.tree.leaves(gradients), jax.tree.leaves(tangents), strict=True)
    )
    assert float(grad) == pytest.approx(backward, rel=1e-4)


# --- what is read --------------------------------------------------------------------------------


def program(count: int, eight_bit: bool) -> jax.stages.Compiled:
    """A step of one token that passes two of `count` experts, as users compile it."""
    mixture = replace(
        tiny.EXPERTS, moe=MoEConfig(num_experts=count, num_experts_per_token=2, hidden_dim=128)
    )
    layer = replace(tiny.GEMMA4_MOE.layers[0], ffw=mixture)
    config = replace(tiny.GEMMA4_MOE, width=128, layers=(layer,))
    dtype = jnp.dtype(jnp.bfloat16)

    def build() -> Experts:
        model = eg.Transformer(config, key=jax.random.key(0), dtype=dtype)
        return (int8(model) if eight_bit else model).layers[0].ffw.experts

    module = eqx.filter_eval_shape(build)
    x = jax.ShapeDtypeStruct((1, 128), dtype)
    chosen, weights = (jax.ShapeDtypeStruct((1, 2), kind) for kind in (jnp.int32, jnp.float32))
    step = jax.jit(lambda module, *rest: module(*rest))
    return as_users_compile(step.lower(module, x, chosen, weights))


on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the text is that of XLA on CPU")
stored = pytest.mark.parametrize("eight_bit", [False, True])


def check_sizes(few: jax.stages.Compiled, many: jax.stages.Compiled) -> None:
    """For ten times the experts nothing more is made on the way, and nothing larger."""
    made = [[(op.dtype, op.shape) for op in operations(one)] for one in (few, many)]
    assert made[0] == made[1]
    assert many.memory_analysis().temp_size_in_bytes == few.memory_analysis().temp_size_in_bytes


@on_cpu
@stored
def test_a_step_reads_the_chosen_experts_where_they_are(eight_bit, kernel):
    few, many = program(13, eight_bit), program(131, eight_bit)
    check_sizes(few, many)
    # The kernel gets what the program got, not a copy or a part of it.
    (entry,) = re.findall(r"^ENTRY [^\n]*\n(.*?)^\}", many.as_text(), re.M | re.S)
    given = re.findall(r"%(\S+) = \w+\[131,[^\n]* parameter\(", entry)
    calls = re.findall(r"custom-call\(([^)]*)\), custom_call_target=\"equigemma_experts", entry)
    assert len(calls) == 2
    for arguments in calls:
        assert any(f"%{name}" in arguments.split(", ")[1] for name in given)


@on_cpu
@stored
def test_a_step_reads_only_what_the_chosen_experts_weigh(eight_bit, monkeypatch):
    monkeypatch.setattr(_native, "calls", lambda: None)
    few, many = program(13, eight_bit), program(131, eight_bit)
    check_sizes(few, many)
    # What reads the weights of all experts, reads a slice of them.
    fused = re.findall(r"^%\S*fused\S* \(([^\n]*)\{\n(.*?)^\}", many.as_text(), re.M | re.S)
    readers = [body for arguments, body in fused if "[131," in arguments]
    assert len(readers) == (4 if eight_bit else 2)  # gate and down projection, and their scales
    for body in readers:
        assert " dynamic-slice(" in body or " gather(" in body
        assert " reduce(" not in body and " dot(" not in body


# --- the router ----------------------------------------------------------------------------------


def router() -> Router:
    shapes = eqx.filter_eval_shape(Router, WIDTH, CONFIG, 1e-6, key=jax.random.key(0), dtype=FLOAT)
    return jax.tree.map(lambda leaf: tiny.normal(leaf.size, *leaf.shape), shapes)


def test_the_router_by_hand():
    module = router()
    module = eqx.tree_at(
        lambda r: (r.scale, r.logits.weight, r.expert_scale),
        module,
        (
            jnp.full(WIDTH, np.sqrt(WIDTH), jnp.float32),  # undoes the division by √D
            jnp.eye(WIDTH, 7),
            jnp.asarray([1, 1, 10, 1, 1, 1, 1], jnp.float32),
        ),
    )
    logits = np.array([0, 3, 2, 0, -1, 1, 0, 0, 0, 0, 0.0])
    scaled = 5 * logits / np.sqrt(np.mean(logits**2))
    chosen, weights = apply(
        module, tiny.host(logits * 17, np.float32)
    )  # the norm undoes the factor
    assert chosen.tolist() == [1, 2, 5]
    shares = np.exp(scaled[[1, 2, 5]] / 5)
    np.testing.assert_allclose(weights, shares / shares.sum() * [1, 10, 1], rtol=1e-5)  # float32


def test_of_equals_the_router_takes_the_first():
    module = router()
    module = eqx.tree_at(lambda r: r.logits.weight, module, jnp.zeros((WIDTH, 7)))
    chosen, weights = apply(module, tiny.normal(0, 2, WIDTH))
    assert chosen.tolist() == [[0, 1, 2], [0, 1, 2]]
    np.testing.assert_allclose(
        weights, np.asarray(module.expert_scale)[None, :3] / 3 * np.ones((2, 1)), rtol=1e-6
    )


def test_choices_are_exact():
    # Logits are float32, so that experts which bfloat16 cannot tell apart are told apart.
    module = jax.tree.map(lambda leaf: tiny.host(leaf, jnp.bfloat16), router())
    x = tiny.normal(0, 401, WIDTH, dtype=jnp.bfloat16)
    chosen, weights = apply(module, x)
    assert weights.dtype == jnp.float32
    wide = reference.wide(x)
    normed = wide / np.sqrt(np.square(wide).mean(axis=-1, keepdims=True) + 1e-6)
    logits = (
        normed
        * reference.wide(module.scale)
        / np.sqrt(WIDTH)
        @ reference.wide(module.logits.weight)
    )
    np.testing.assert_array_equal(chosen, np.argsort(-logits, axis=-1)[:, :3])


def test_the_router_reads_the_stream_itself():
    # DeepMind's package once normalised it twice: with the scale of the experts' norm on the way.
    model = tiny.model(tiny.CONFIGS["gemma4 experts"])
    module = model.layers[0].ffw
    x = tiny.normal(0, 5, tiny.WIDTH)
    scaled = eqx.tree_at(
        lambda m: m.pre_experts_norm.scale, module, replace_fn=lambda scale: -3 * scale
    )

    @eqx.filter_jit
    def by_parts(module, scaled):
        chosen, weights = module.router(x)
        dense = module.post_dense_norm(module.dense(module.pre_dense_norm(x)))
        mixed = scaled.experts(scaled.pre_experts_norm(x), chosen, weights)
        twice, _ = scaled.router(scaled.pre_experts_norm(x))
        return dense + module.post_experts_norm(mixed), chosen, twice

    expected, chosen, twice = by_parts(module, scaled)
    np.testing.assert_allclose(apply(scaled, x), expected, **CLOSE)
    assert (np.asarray(twice) != np.asarray(chosen)).any()
