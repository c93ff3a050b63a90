"""Programs for GPU and TPU, read on a machine that has none: exported for them, from shapes only.

What is asserted are faults that cost a factor there, or that do not run at all. For each there is a
program that has it.
"""

import math
from dataclasses import replace
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import tiny
from jax.experimental.layout import Layout, with_layout_constraint
from stablehlo import CALL, Operation, barriers, calls, exported, products, wide_weights

import equigemma as eg
from equigemma import quantize, train
from equigemma._kernels import sum_of_squares
from equigemma.config import DensePlusMoEConfig, FeedForwardConfig, MoEConfig, OwnKVConfig
from equigemma.sampling import Greedy, Sample, _generate
from equigemma.sampling._request import GenerationRequest, validate_and_pad


VOCAB, WIDTH, HIDDEN, HEAD, CAPACITY, ROWS = 1009, 131, 257, 62, 4096, 2
FORMS = {
    "plain": lambda model: model,
    "prepared": eg.prepare,
    "xla": partial(eg.prepare, attention="xla"),
    "int8": quantize.int8,
    "int8 groups": partial(quantize.int8, group_size=32),
    "int4 groups": quantize.int4,
}
platforms = pytest.mark.parametrize("platform", ["cuda", "tpu"])
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module", autouse=True)
def unchecked_shapes():
    """Programs are what is tested: other tests check the shapes of what they are traced with."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def config() -> eg.ModelConfig:
    """A local and a global layer of Gemma 3, of sizes that only weights have."""
    local, *_, global_ = eg.variants.get("gemma3-270m").layers[:6]

    def resized(layer, window):
        attention = replace(layer.attention, head_dim=HEAD, kv=OwnKVConfig(heads=1), window=window)
        return replace(layer, attention=attention, ffw=FeedForwardConfig(hidden_dim=HIDDEN))

    return eg.ModelConfig(
        vocab=VOCAB, width=WIDTH, layers=(resized(local, 509), resized(global_, None))
    )


@cache
def shapes(form: str, dtype=jnp.bfloat16) -> eg.Transformer:
    """A model without its arrays."""

    def build() -> eg.Transformer:
        return FORMS[form](eg.Transformer(config(), key=jax.random.key(0), dtype=dtype))

    return eqx.filter_eval_shape(build)


def sizes(model) -> set[int]:
    """Of all matrices, and of the numbers that bytes of a matrix stand for."""
    found = {leaf.size for leaf in jax.tree.leaves(model) if leaf.ndim > 1}
    plain = {leaf.size for leaf in jax.tree.leaves(shapes("plain")) if leaf.ndim > 1}
    return {size for size in found | plain if size > 2 * WIDTH * HEAD}


def request_of(model, sampler=Greedy()) -> GenerationRequest:
    key = None if sampler == Greedy() else jax.random.key(0)
    return validate_and_pad(
        model,
        np.ones((ROWS, 3), np.int32),
        max_new_tokens=CAPACITY - 3,
        stop_tokens=(),
        cache=None,
        sampler=sampler,
        key=key,
    )


@cache
def generation(form: str, platform: str) -> list[Operation]:
    """Prefill and the decode loop."""
    model = shapes(form)
    limit = jnp.asarray(1, jnp.int32)
    return exported(_generate._run, platform, model, request_of(model), Greedy(), limit)


@cache
def gradient(platform: str) -> list[Operation]:
    """Of float32 weights that compute in bfloat16."""
    model = shapes("plain", jnp.float32)
    loss = partial(train.next_token_loss, compute_dtype=jnp.bfloat16)
    slope = jax.jit(jax.value_and_grad(lambda model, batch: loss(model, batch)[0]))
    return exported(slope, platform, model, batch())


def batch() -> train.Batch:
    texts = [train.Example(np.ones(length, np.int32), np.ones(length)) for length in (7, 4, 11)]
    return next(train.pack(texts, length=11, rows=3))


@forms
@platforms
def test_generation(form, platform):
    program = generation(form, platform)
    # Also a step, which is a loop within the decode loop: four or five products for each layer.
    assert sum(one.loops == 2 for one in products(program)) > 8
    assert barriers(program) == []
    assert calls(program) == []
    assert wide_weights(program, sizes(shapes(form))) == []


@platforms
def test_drawn_tokens_need_no_host(platform):
    model, sampler = shapes("prepared"), Sample()
    limit = jnp.asarray(1, jnp.int32)
    program = exported(_generate._run, platform, model, request_of(model, sampler), sampler, limit)
    assert barriers(program) == []
    # Of random bits JAX has a kernel of its own for NVIDIA's GPUs.
    assert set(calls(program)) <= {"cu_threefry2x32_ffi"}


@platforms
def test_a_gradient_in_bfloat16(platform):
    program = gradient(platform)
    assert barriers(program) == []
    assert calls(program) == []
    weights = sizes(shapes("plain"))
    made = products(program)
    assert len(made) > 20
    assert wide_weights(made, weights) == []


@pytest.mark.slow
@platforms
def test_a_training_step(platform):
    model = shapes("plain", jnp.float32)
    optimizer = optax.adamw(1e-3)
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        state = eqx.filter_eval_shape(train.init, model, optimizer)
        loss = partial(train.next_token_loss, compute_dtype=jnp.bfloat16, remat="nothing")
        step = train.make_step(loss, optimizer, max_grad_norm=1.0)
        program = exported(jax.jit(step), platform, state, batch())
    assert calls(program) == []
    found = wide_weights(products(program), sizes(model))
    # The product of a gradient with itself is a part of its norm.
    assert [one for one in found if one.reads[0] != one.reads[1]] == []


EXPERTS = MoEConfig(num_experts=16, num_experts_per_token=2, hidden_dim=67)


def moe_shapes(form: str) -> eg.Transformer:
    """The layers of Gemma 4 with experts, of sizes that only weights have."""
    small = tiny.GEMMA4_MOE
    ffw = DensePlusMoEConfig(dense=FeedForwardConfig(hidden_dim=HIDDEN), moe=EXPERTS)
    layers = tuple(replace(layer, ffw=ffw) for layer in small.layers)
    config = replace(small, vocab=VOCAB, width=WIDTH, layers=layers)

    def build() -> eg.Transformer:
        return FORMS[form](eg.Transformer(config, key=jax.random.key(0), dtype=jnp.bfloat16))

    return eqx.filter_eval_shape(build)


def in_loops_over_experts(program: list[Operation]) -> list[Operation]:
    """Products with the weight of one expert, or of some, that a loop repeats."""
    sizes = {EXPERTS.hidden_dim * WIDTH * matrices for matrices in (1, 2)}
    return [
        one
        for one in products(program)
        if one.loops and any(math.prod(shape[-3:]) in sizes for _, shape in one.reads)
    ]


@pytest.mark.parametrize("form", ["plain", "int8", "int4 groups"])
@platforms
def test_experts_are_computed_together(form, platform):
    tokens = jax.ShapeDtypeStruct((ROWS, 64), jnp.int32)
    forward = jax.jit(lambda model, tokens: model(tokens).logits)
    program = exported(forward, platform, moe_shapes(form), tokens)
    assert barriers(program) == []
    assert calls(program) == []
    assert in_loops_over_experts(program) == []
    # Products of all experts at once: two in each layer.
    stacked = EXPERTS.num_experts * EXPERTS.hidden_dim * WIDTH
    assert sum(any(math.prod(s) >= stacked for _, s in one.reads) for one in products(program)) == 4


def loop(function):
    """`function` in a loop, as decoding is one."""

    @jax.jit
    def run(x, *args):
        return jax.lax.fori_loop(0, 3, lambda _, x: function(x, *args).astype(x.dtype), x)

    return run


WEIGHT = jax.ShapeDtypeStruct((131, 131), jnp.bfloat16)
ROW = jax.ShapeDtypeStruct((131,), jnp.bfloat16)


def program_with(function) -> list[Operation]:
    return exported(loop(function), "cuda", ROW, WEIGHT)


def test_barriers_and_layouts_are_found():
    def tied(x, weight):
        return weight @ jax.lax.optimization_barrier((x, weight))[0]

    def laid_out(x, weight):
        return with_layout_constraint(weight, Layout(major_to_minor=(1, 0))) @ x

    assert barriers(program_with(lambda x, weight: weight @ x)) == []
    for function in (tied, laid_out):
        (found,) = barriers(program_with(function))
        assert found.loops == 1


def test_calls_are_found():
    def native(x, weight):
        return jax.ffi.ffi_call(CALL, jax.ShapeDtypeStruct(x.shape, x.dtype))(weight, x)

    assert calls(program_with(native)) == [CALL]


def test_callbacks_to_the_host_are_found():
    def of_host(x, weight):
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    # Already by JAX, which exports none.
    with pytest.raises(NotImplementedError, match="host_callbacks"):
        exported(loop(of_host), "cpu", ROW, WEIGHT)


def test_loops_over_experts_are_found():
    def one_by_one(x, weight):
        return jax.lax.map(lambda one: x @ one, weight).sum(axis=0)

    def at_once(x, weight):
        return jnp.einsum("d,edf->f", x, weight)

    weight = jax.ShapeDtypeStruct((EXPERTS.num_experts, WIDTH, EXPERTS.hidden_dim), jnp.bfloat16)
    (found,) = in_loops_over_experts(exported(jax.jit(one_by_one), "cuda", ROW, weight))
    assert found.loops == 1
    assert in_loops_over_experts(exported(jax.jit(at_once), "cuda", ROW, weight)) == []


def test_float32_copies_of_weights_are_found():
    def wide_product(x, weight):
        return weight.astype(jnp.float32) @ x.astype(jnp.float32)

    def narrow_product(x, weight):
        return (weight.astype(jnp.float32) * 2).astype(jnp.bfloat16) @ x

    @jax.jit
    def before_the_loop(x, weight):
        wide = weight.astype(jnp.float32)
        return jax.lax.fori_loop(0, 3, lambda _, x: wide.astype(x.dtype) @ x, x)

    sizes = {131 * 131}
    assert wide_weights(program_with(narrow_product), sizes) == []
    (found,) = wide_weights(program_with(wide_product), sizes)
    assert (found.name, found.loops) == ("dot_general", 1)
    kept = wide_weights(exported(before_the_loop, "cuda", ROW, WEIGHT), sizes)
    assert "while" in {one.name for one in kept}
    summed = exported(jax.jit(sum_of_squares), "cuda", WEIGHT)
    assert wide_weights(summed, sizes) != []
