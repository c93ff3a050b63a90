"""Stacked layers against the same layers one by one: logits, gradients, programs, refusals."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hlo import as_users_compile, operations

import equigemma as eg
from equigemma import lora, quantize, train
from equigemma._kernels import _native
from equigemma.config import FeedForwardConfig
from equigemma.nn._stack import _only


LOCAL, GLOBAL = tiny.GEMMA3.layers


def config(periods: int, *rest) -> eg.ModelConfig:
    return tiny.model_config(*((LOCAL, LOCAL, GLOBAL) * periods), *rest)


FIVE = replace(tiny.GEMMA3, layers=(LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL))
# Odd sizes, and matrices that are worth a call.
LARGE = replace(
    LOCAL,
    attention=replace(LOCAL.attention, heads=9, head_dim=254),
    ffw=FeedForwardConfig(hidden_dim=1301),
)
EXPERTS = replace(tiny.GEMMA4_MOE, layers=tiny.GEMMA4_MOE.layers * 2)


def batch() -> train.Batch:
    rng = np.random.default_rng(0)
    texts = [train.Example(rng.integers(0, tiny.VOCAB, n), np.ones(n)) for n in (9, 4, 11)]
    return next(train.pack(texts, length=13, rows=2))


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [FIVE, EXPERTS], ids=["gemma3", "experts"])
def test_logits(chosen):
    model, tokens = tiny.model(chosen), tiny.tokens(2, 11)
    stacked = eg.stack(model)
    assert len(stacked.layers.period) == 2
    assert len(stacked.layers.rest) == len(chosen.layers) % 2
    assert repr(stacked) == repr(model)
    # The same operations, fused differently: logits up to 20 in float32.
    expected = tiny.run(model, tokens).logits
    np.testing.assert_allclose(tiny.run(stacked, tokens).logits, expected, rtol=0, atol=1e-4)


def test_there_and_back():
    model = tiny.model(FIVE)
    assert eqx.tree_equal(eg.unstack(eg.stack(model)), model)
    stacked = eg.stack(model)
    assert eg.stack(stacked) is stacked
    assert eg.unstack(model) is model


@pytest.mark.slow
def test_gradients():
    model = tiny.model(FIVE)

    @eqx.filter_jit
    def grads(model):
        def loss(model):
            return train.next_token_loss(model, batch(), remat="nothing")[0]

        return eg.unstack(jax.grad(loss)(eg.stack(model))), jax.grad(loss)(model)

    ours, theirs = map(jax.tree.leaves, grads(model))
    for one, other in zip(ours, theirs, strict=True):
        scale = float(jnp.abs(other).max()) + 1e-3
        # Sums over 26 tokens in float32, in another order.
        np.testing.assert_allclose(one / scale, other / scale, rtol=0, atol=2e-5)


def test_parts_of_a_stack_of_bfloat16():
    """Whole gradients say little: rounding makes up a tenth of those of a tiny model."""
    stack = jnp.array([[2, 3], [5, -1], [1, 7]], jnp.bfloat16)

    def loop(stack):
        def step(x, numbered):
            return x * _only(*numbered, stack), None

        parts = jnp.arange(3), stack
        return jax.lax.scan(jax.checkpoint(step), jnp.ones(2, stack.dtype), parts)[0].sum()

    expected = jnp.array([[5, -7], [2, 21], [10, -3]], jnp.bfloat16)
    value, grad = jax.jit(jax.value_and_grad(loop))(stack)
    assert value == 2 * 5 * 1 + 3 * -1 * 7
    np.testing.assert_array_equal(grad, expected)
    np.testing.assert_array_equal(jax.jit(jax.jacfwd(loop))(stack), expected)
    several = jax.jit(jax.vmap(jax.grad(loop)))(jnp.stack([stack, stack[::-1]]))
    np.testing.assert_array_equal(several, jnp.stack([expected, expected[::-1]]))


@pytest.mark.slow
def test_a_step_of_training():
    model = tiny.model(FIVE)
    state = train.init(eg.stack(model), optax.sgd(1e-2))
    state, first = train.make_step(train.next_token_loss, optax.sgd(1e-2))(state, batch())
    total, weight = eqx.filter_jit(train.next_token_loss)(model, batch())
    np.testing.assert_allclose(first.loss, total / weight, rtol=1e-5)
    learned = eg.unstack(train.merge(state))
    moved = [
        not np.array_equal(*pair)
        for pair in zip(*map(jax.tree.leaves, (learned, model)), strict=True)
    ]
    assert all(moved)


@pytest.mark.slow
def test_adapters_before_it():
    model = lora.add(tiny.model(FIVE), rank=2, key=jax.random.key(0))
    model = jax.tree.map(lambda leaf: leaf + 0.1, model)  # no adapter is zero
    tokens = tiny.tokens(7)
    expected = tiny.run(model, tokens).logits
    np.testing.assert_allclose(
        tiny.run(eg.stack(model), tokens).logits,
        expected,
        rtol=0,
        atol=1e-5 * float(jnp.abs(expected).max()),
    )


@pytest.mark.parametrize(
    "use",
    [
        lambda model: lora.add(model, rank=2, key=jax.random.key(0)),
        lora.merge,
        eg.prepare,
        lambda model: eg.save(model, "never.gguf"),
        quantize.int8,
    ],
    ids=["lora.add", "lora.merge", "prepare", "save", "int8"],
)
def test_what_wants_single_layers_says_so(use):
    with pytest.raises(ValueError, match=r"take eg\.unstack\(model\)"):
        use(eg.stack(tiny.model(FIVE)))


def test_no_single_layers():
    layers = eg.stack(tiny.model(FIVE)).layers
    for use in (len, list, lambda layers: layers[0]):
        with pytest.raises(TypeError, match=r"take eg\.unstack\(model\)"):
            use(layers)


FORMS = {
    "plain": lambda model: model,
    "prepared": eg.prepare,
    "int8": quantize.int8,
    "groups": lambda model: quantize.int8(model, group_size=32),
    "int4": quantize.int4,
    "lora": lambda model: lora.add(model, rank=2, key=jax.random.key(0)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "form"), [*((FIVE, form) for form in FORMS), (EXPERTS, "plain"), (EXPERTS, "int8")]
)
def test_decoding(chosen, form):
    """Some tokens at once, then one by one."""
    model, tokens = FORMS[form](tiny.model(chosen)), tiny.tokens(2, 8)
    stacked = eg.stack(model)

    def logits(model):
        cache, found = tiny.empty_cache(chosen, 2, capacity=12), []
        for part in (tokens[:, :6], tokens[:, 6:7], tokens[:, 7:8]):
            out = tiny.run(model, part, cache=cache)
            cache = out.cache
            found.append(out.logits)
        return jnp.concatenate(found, axis=1)

    expected = logits(model)
    # The same operations, fused differently.
    np.testing.assert_allclose(
        logits(stacked), expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max())
    )


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(5,), (2, 5)], ids=["one", "two"])
def test_generation(rows):
    model, tokens = tiny.model(FIVE), tiny.tokens(*rows)
    ours, theirs = (
        eg.sampling.generate(each, tokens, max_new_tokens=7, stop_tokens=())
        for each in (eg.stack(model), model)
    )
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="this is about XLA on CPU")
@pytest.mark.skipif(_native.calls() is None, reason="there is no kernel that reads a stack")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("form", ["plain", "prepared", "int8"])
def test_a_decoding_loop_never_copies_a_weight(form, dtype):
    chosen = tiny.model_config(*(LARGE,) * 3)

    def build() -> eg.Transformer:
        return eg.stack(FORMS[form](eg.Transformer(chosen, key=jax.random.key(0), dtype=dtype)))

    model = eqx.filter_eval_shape(build)
    cache = eqx.filter_eval_shape(lambda: eg.init_cache(chosen, capacity=16, dtype=dtype))

    @jax.jit
    def decode(model, token, cache):
        def step(_, state):
            out = model(state[0][None], cache=state[1])
            return out.logits[0].argmax(), out.cache

        return jax.lax.fori_loop(0, 9, step, (token, cache))

    stacks = [leaf for leaf in jax.tree.leaves(model.layers.period) if leaf.ndim > 2]
    sizes = {leaf.size for leaf in stacks} | {leaf.size // 3 for leaf in stacks}
    program = as_users_compile(decode.lower(model, jnp.int32(1), cache))
    written = operations(program)
    assert len(written) > 20
    assert [one for one in written if one.size in sizes] == []


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (tiny.GEMMA3, "The 2 layers of this model do not repeat"),
        (tiny.GEMMA3N, "attend to the keys of earlier ones, or have an embedding of their own"),
    ],
)
def test_layers_that_cannot_be_stacked(chosen, message):
    with pytest.raises(ValueError, match=message):
        eg.stack(tiny.model(chosen))


def program(periods: int, dtype: type) -> tuple[list, set[int]]:
    """What is computed, and the sizes of all matrices of a stack."""

    def build() -> eg.Transformer:
        return eg.stack(eg.Transformer(config(periods), key=jax.random.key(0), dtype=dtype))

    model, tokens = eqx.filter_eval_shape(build), jax.ShapeDtypeStruct((7,), jnp.int32)
    run = jax.jit(lambda model, tokens: model(tokens).logits)
    sizes = {leaf.size for leaf in jax.tree.leaves(model.layers.period) if leaf.ndim > 2}
    return operations(as_users_compile(run.lower(model, tokens))), sizes


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="this is about XLA on CPU")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_program_is_as_long_as_its_period_and_never_holds_all(dtype):
    few, _ = program(2, dtype)
    many, sizes = program(7, dtype)
    assert len(few) == len(many)
    assert [one for one in many if one.size in sizes] == []
