"""Keys and values in 8 bits: rounded once, and nothing else changes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hlo import as_users_compile, operations
from quantized import check_close

import equigemma as eg
from equigemma import sampling
from equigemma.nn import Int8KVCache, capacity, init_cache
from equigemma.nn._cache import AbstractKVCache, KVCache
from equigemma.nn._model_cache import share_kv
from equigemma.sampling import Greedy, _request, _stream
from equigemma.sampling._request import validate_and_pad


LENGTH = 17


def rounded(x: np.ndarray) -> np.ndarray:
    """Each vector in steps of 1/127 of its largest number."""
    scale = np.abs(x).max(axis=-1, keepdims=True).astype(np.float32) / np.float32(127)
    return np.round(x / scale) * scale


def new_keys(seed: int, *shape: int) -> Any:
    """Random keys and values of a model's first layer at the positions 0, 1, ..."""
    from equigemma.nn._cache import KeysValues

    k, v = (np.random.default_rng(seed + i).normal(size=shape).astype(np.float32) for i in (0, 1))
    return KeysValues(jnp.asarray(k), jnp.asarray(v), jnp.arange(shape[-2], dtype=jnp.int32))


@pytest.mark.parametrize("chunk", [1, 4])
def test_slots_hold_what_was_rounded(chunk):
    """A ring of 5 slots and a layer with room for all 11, one and four tokens at a time."""
    for slots, window in ((5, 5), (11, None)):
        new = new_keys(0, 2, 11, 3)
        zeros, ones = jnp.zeros((2, slots, 3), jnp.int8), jnp.zeros((2, slots, 1), jnp.float32)
        layer: AbstractKVCache = Int8KVCache(zeros, zeros, ones, ones)
        update = jax.jit(
            lambda layer, new, length, window=window: layer.update(new, length, window)
        )
        for start in range(0, 11, chunk):
            piece = slice(start, min(start + chunk, 11))
            part = eqx.tree_at(
                lambda keys: (keys.k, keys.v, keys.positions),
                new,
                (new.k[:, piece], new.v[:, piece], new.positions[piece]),
            )
            seen, layer = update(layer, part, jnp.asarray(start, jnp.int32))
            positions = np.asarray(seen.positions)
            for theirs, ours in ((seen.k, new.k), (seen.v, new.v)):
                expected = rounded(np.asarray(ours))[:, positions[positions >= 0]]
                # The quotient of two floats and its product are rounded in the last bit.
                np.testing.assert_allclose(
                    np.asarray(theirs)[:, positions >= 0], expected, rtol=1e-6, atol=1e-6
                )
            assert positions.max() == piece.stop - 1


class Rounding(AbstractKVCache):
    """The plain reference: rounds what comes, and lets a cache of floats do the rest."""

    floats: KVCache

    def update(self, new, length, window):
        def narrow(x):
            scale = jnp.abs(x).max(axis=-1, keepdims=True) / 127
            return jnp.round(x / scale) * scale

        new = eqx.tree_at(lambda keys: (keys.k, keys.v), new, (narrow(new.k), narrow(new.v)))
        keys, floats = self.floats.update(new, length, window)
        return keys, Rounding(floats)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gemma4 small"])
def test_it_is_the_model_that_rounds_keys_and_values(name):
    model = tiny.model(tiny.CONFIGS[name])
    tokens = tiny.tokens(2, LENGTH)
    sizes = (7, *[1] * (LENGTH - 7))
    plain = tiny.empty_cache(model.config, (2,), capacity=LENGTH)
    reference = eqx.tree_at(
        lambda cache: cache.layers,
        plain,
        tuple(None if layer is None else Rounding(layer) for layer in plain.layers),
    )
    expected = tiny.run_in_chunks(model, tokens, sizes, cache=reference).logits
    narrow = tiny.empty_cache(model.config, (2,), capacity=LENGTH, dtype=jnp.int8)
    output = tiny.run_in_chunks(model, tokens, sizes, cache=narrow)
    check_close(output.logits, expected)
    exact = np.asarray(tiny.run(model, tokens).logits)
    # Of each number up to half a step of 1/127 of the largest of ten.
    assert 0.001 < np.std(output.logits - exact) / np.std(exact) < 0.05
    # Chunks make no difference, also ones longer than a window.
    again = tiny.run_in_chunks(model, tokens, (1, 12, 4), cache=narrow)
    check_close(again.logits, expected)
    assert capacity(model.config, narrow) == capacity(model.config, plain)


def test_bytes():
    config = eg.variants.get("gemma3-270m")

    def size(dtype) -> int:
        cache = jax.eval_shape(lambda: init_cache(config, capacity=4096, dtype=dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))

    # 256 numbers and a scale of 4 bytes, for 2 · 256 bytes.
    assert size(jnp.int8) == size(jnp.bfloat16) * 260 // 512


@pytest.mark.slow
def test_generation():
    model = tiny.model(tiny.GEMMA3)
    tokens = tiny.tokens(2, 7)
    options: dict[str, Any] = {"max_new_tokens": 5}
    generated = sampling.generate(model, tokens, cache_dtype=jnp.int8, **options)
    assert isinstance(generated.cache.layers[0], Int8KVCache)
    cache = init_cache(model.config, (2,), capacity=12, dtype=jnp.int8)
    with_own = sampling.generate(model, tokens, cache=cache, **options)
    np.testing.assert_array_equal(generated.tokens, with_own.tokens)
    steps = sampling.stream(model, tokens, cache_dtype=jnp.int8, **options)
    np.testing.assert_array_equal(np.stack(list(steps), axis=-1), generated.tokens)
    with pytest.raises(ValueError, match="cache_dtype=int8 is for a new cache, and one is given"):
        sampling.generate(model, tokens, cache=cache, cache_dtype=jnp.int8, **options)


def test_a_cache_of_another_model_is_refused():
    cache = tiny.empty_cache(tiny.GEMMA3, capacity=5, dtype=jnp.int8)
    assert len(share_kv(tiny.GEMMA3, cache)) == 2
    other = tiny.model(tiny.GEMMA1_MQA)
    with pytest.raises(ValueError, match="layer 0 has keys of shape .* this model's are"):
        other(tiny.tokens(3), cache=cache)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="these are facts about XLA on CPU")
def test_a_step_keeps_eight_bits_in_place():
    def build() -> eg.Transformer:
        return eg.Transformer(tiny.GEMMA3, key=jax.random.key(0), dtype=jnp.bfloat16)

    model = eqx.filter_eval_shape(build)
    request = validate_and_pad(
        model,
        jnp.arange(3),
        max_new_tokens=4093,
        stop_tokens=(),
        cache=None,
        sampler=Greedy(),
        cache_dtype=jnp.int8,
    )
    state = jax.eval_shape(_request.start, model, request, Greedy())
    advance: Any = _stream.advance
    step = as_users_compile(advance.lower(model, state, Greedy(), request.stop_tokens))
    size = 4096 * tiny.GEMMA3.kv_heads(1) * tiny.GEMMA3.layers[1].attention.head_dim
    made = [one for one in operations(step) if one.size == size]
    # Two updates, and what attention multiplies with: XLA on CPU makes floats of keys and values.
    assert sorted(one.dtype for one in made if one.dtype == "s8") == ["s8", "s8"]
    # An update of one slot is made in place. Of floats it is a step of its own from 0.11 on.
    whole = [one for one in made if "dynamic-update-slice" not in one.kind]
    assert [one.dtype for one in whole] == ["bf16", "bf16"]
    memory = step.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes > 2 * size
