"""What XLA makes of decoding on CPU, read from the compiled programs: no time is measured.

Every weight is read as it is stored: nothing of its size is ever written. Caches are updated where
they are. These are the properties that a step's speed depends on, each by a factor.
"""

from dataclasses import replace
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import tiny
from hlo import as_users_compile, loop_bodies, operations, with_inner_loops

import equigemma as eg
from equigemma import prepare
from equigemma._kernels._slot_update import COPIES_SLICES, REPEATS_SELECTIONS
from equigemma.config import FeedForwardConfig, OwnKVConfig
from equigemma.quantize import int8
from equigemma.sampling import Greedy, _generate, _request, _stream
from equigemma.sampling._request import GenerationRequest, validate_and_pad


pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="these are facts about XLA on CPU"
)

VOCAB, WIDTH, HIDDEN, HEAD, WINDOW, CAPACITY = 1009, 131, 257, 62, 509, 4096


def config(kv_heads: int) -> eg.ModelConfig:
    """The layers of Gemma 3, a local and a global one, of odd sizes."""
    local, *_, global_ = eg.variants.get("gemma3-270m").layers[:6]

    def resized(layer, window):
        attention = replace(
            layer.attention, head_dim=HEAD, kv=OwnKVConfig(heads=kv_heads), window=window
        )
        return replace(layer, attention=attention, ffw=FeedForwardConfig(hidden_dim=HIDDEN))

    layers = (resized(local, WINDOW), resized(global_, None))
    return eg.ModelConfig(vocab=VOCAB, width=WIDTH, layers=layers)


def shapes(form: str, kv_heads: int, dtype) -> eg.Transformer:
    """A model without its arrays."""
    transform = {"plain": lambda model: model, "prepared": prepare, "int8": int8}[form]

    def build() -> eg.Transformer:
        return transform(eg.Transformer(config(kv_heads), key=jax.random.key(0), dtype=dtype))

    return eqx.filter_eval_shape(build)


def request_of(model: eg.Transformer) -> GenerationRequest:
    return validate_and_pad(
        model,
        jnp.arange(3),
        max_new_tokens=CAPACITY - 3,
        stop_tokens=(),
        cache=None,
        sampler=Greedy(),
    )


@cache
def step(form: str, kv_heads: int, dtype) -> jax.stages.Compiled:
    """One token of a stream."""
    model = shapes(form, kv_heads, dtype)
    request = request_of(model)
    state = jax.eval_shape(_request.start, model, request, Greedy())
    return as_users_compile(_stream.advance.lower(model, state, Greedy(), request.stop_tokens))


@cache
def generation(kv_heads: int, dtype) -> jax.stages.Compiled:
    """A whole answer of a prepared model."""
    model = shapes("prepared", kv_heads, dtype)
    limit = jnp.asarray(1, jnp.int32)
    return as_users_compile(_generate._run.lower(model, request_of(model), Greedy(), limit))


def weight_sizes(kv_heads: int) -> set[int]:
    """Also of the parts that a prepared model joins."""
    model = shapes("plain", kv_heads, jnp.float32), shapes("prepared", kv_heads, jnp.float32)
    return {leaf.size for leaf in jax.tree.leaves(model) if leaf.ndim > 1}


def cache_sizes(kv_heads: int) -> set[int]:
    return {kv_heads * WINDOW * HEAD, kv_heads * CAPACITY * HEAD}


UPDATE, SELECTION = "select_dynamic-update-slice_fusion", "select_convert_fusion"
UPDATES = {jnp.float32: UPDATE, jnp.bfloat16: SELECTION if COPIES_SLICES else UPDATE}


@pytest.fixture(scope="module", autouse=True)
def unchecked_shapes():
    """Programs are what is tested: other tests check the shapes of what they are traced with."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


programs = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
heads = pytest.mark.parametrize("kv_heads", [1, 2])


@pytest.mark.slow
@programs
@pytest.mark.parametrize("form", ["plain", "prepared", "int8"])
def test_a_step_writes_nothing_of_the_size_of_a_weight(form, dtype):
    written = operations(step(form, 1, dtype))
    assert len(written) > 20
    assert [one for one in written if one.size in weight_sizes(1)] == []


@pytest.mark.slow
@programs
def test_a_whole_generation_writes_nothing_of_the_size_of_a_weight(dtype):
    # Also not before its loops: what does not change from step to step is tempting to move there.
    written = operations(generation(1, dtype))
    assert [one for one in written if one.size in weight_sizes(1)] == []


@pytest.mark.slow
@programs
@heads
def test_a_step_updates_caches_where_they_are(dtype, kv_heads):
    program = step("prepared", kv_heads, dtype)
    made = [one for one in operations(program) if one.size in cache_sizes(kv_heads)]
    assert [one.kind for one in made] == 4 * [UPDATES[dtype]]
    # The caches come and go in the same memory, and beside them there is no room for another.
    memory = program.memory_analysis()
    assert memory is not None
    itemsize = jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes > 2 * sum(cache_sizes(kv_heads)) * itemsize
    assert memory.temp_size_in_bytes < kv_heads * CAPACITY * HEAD * itemsize


@programs
def test_a_decoding_loop_updates_caches_where_they_are(dtype):
    program = generation(1, dtype)
    decoding = [
        one.computation
        for one in operations(program)
        if one.size == VOCAB and one.computation in loop_bodies(program)
    ]
    step = with_inner_loops(program, decoding[0])
    made = [
        one.kind
        for one in operations(program)
        if one.computation in step and one.size in cache_sizes(1)
    ]
    assert len(set(decoding)) == 1
    assert made == 4 * [UPDATES[dtype]]


@programs
def test_a_step_is_few_operations(dtype):
    # Each costs about a microsecond, whatever its size, and each layer has about 40 of them. A loop
    # around the update of a cache is two more.
    loops = 4 if REPEATS_SELECTIONS and dtype == jnp.bfloat16 else 0
    assert len(operations(step("prepared", 1, dtype))) < 120 + 2 * loops


@pytest.mark.slow
def test_a_stream_keeps_its_memory():
    model = tiny.model(tiny.GEMMA3)
    request = request_of(model)
    state = _request.start(model, request, Greedy())
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.cache.layers)]
    after, *_ = _stream.advance(model, state, Greedy(), request.stop_tokens)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert buffers == [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.cache.layers)]
