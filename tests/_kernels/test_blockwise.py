"""Attention in blocks against one whole mask: rings, padding, packed texts, gradients, programs."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hlo import as_users_compile, operations

import equigemma as eg
from equigemma._kernels import _blockwise, blockwise_attention
from equigemma._kernels import attention as attention_kernel
from equigemma.nn import KVCache
from equigemma.nn._attention import SequenceInfo
from equigemma.nn._cache import KeysValues
from equigemma.nn._mask import attention_mask
from equigemma.nn._mask_spec import MaskSpec


N, K, H = 6, 3, 2
mix = partial(attention_kernel, softcap=2.0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that short texts have many blocks, and few logits are too many."""
    monkeypatch.setattr(_blockwise, "BLOCK", 4)
    monkeypatch.setattr(_blockwise, "UNROLLED", 3)
    monkeypatch.setattr(_blockwise, "LARGEST", 2_000)


@jax.jit
def whole(q, k, v, mask):
    return mix(q, k, v, mask)


def random(seed: int, *shape: int) -> jax.Array:
    return tiny.normal(seed, *shape)


def padded(length: int, starts: list[int], before: list[int], after: list[int]) -> np.ndarray:
    """Positions that go on from `starts`, with padding in front of and behind them."""
    rows = []
    for start, front, behind in zip(starts, before, after, strict=True):
        run = start + np.arange(length - front - behind)
        rows.append(np.r_[np.full(front, -1), run, np.full(behind, -1)])
    return np.array(rows, np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1, 5, 97])
@pytest.mark.parametrize("length", [3, 31])
def test_without_a_cache(length, window):
    front, behind = min(2, length - 1), min(7, length - 1)
    positions = padded(length, [0, 3, 0], [0, front, 0], [0, 0, behind])
    q, k, v = (random(i, 3, *shape) for i, shape in enumerate(shapes(length, length)))
    positions = jnp.asarray(positions)
    mask_spec = MaskSpec(positions, positions, window, key_layout="aligned")

    @jax.jit
    def banded(q, k, v):
        return blockwise_attention(mix, q, k, v, mask_spec)

    mask, real = attention_mask(positions, positions, window), np.asarray(positions) >= 0
    expected = whole(q, k, v, mask)
    # The same sums over fewer hidden keys: their order differs, in float32.
    np.testing.assert_allclose(banded(q, k, v)[real], expected[real], rtol=0, atol=2e-6)

    def grad(f):
        return jax.jit(jax.grad(lambda x: jnp.square(f(*x)[real]).sum()))((q, k, v))

    theirs = grad(lambda q, k, v: mix(q, k, v, mask))
    for ours, expected in zip(grad(banded), theirs, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)  # grads up to 10


def shapes(length: int, slots: int) -> list[tuple[int, ...]]:
    return [(length, N, H), (K, slots, H), (K, slots, H)]


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3, 11])
@pytest.mark.parametrize("length", [2, 7, 31])
def test_with_a_cache_as_with_all_keys(length, window):
    # Rows that have seen nothing, less than the window and more, then a chunk with padding.
    seen, most = [0, 2, 17], 17 + length
    slots = most if window is None else window
    front, behind = [0, 1, 0], [1, 0, 0]
    everything = [random(i, 3, *shape) for i, shape in enumerate(shapes(most, most))]
    blank = jnp.zeros((3, K, slots, H))
    layer, lengths = KVCache(blank, blank), jnp.zeros(3, jnp.int32)
    positions = padded(length, seen, front, behind)

    def taken(x, where, axis):
        at = np.maximum(where, 0).reshape(3, *(-1 if i == axis else 1 for i in (1, 2, 3)))
        return jnp.asarray(np.take_along_axis(np.asarray(x), at, axis))

    def chunk(where):
        k, v = (taken(x, where, 2) for x in everything[1:])
        return KeysValues(k, v, jnp.asarray(where))

    history = padded(17, [0, 0, 0], [0, 0, 0], [17 - count for count in seen])
    update = jax.jit(lambda layer, new, lengths: layer.update(new, lengths, window))
    _, layer = update(layer, chunk(history), lengths)
    lengths = jnp.asarray(seen, jnp.int32)

    @jax.jit
    def banded(q, layer, new):
        keys, _ = layer.update(new, lengths, window)
        mask_spec = MaskSpec(new.positions, keys.positions, window, key_layout=keys.key_layout)
        return blockwise_attention(mix, q, keys.k, keys.v, mask_spec), keys.key_layout is None

    q = taken(everything[0], positions, 1)
    mixed, unknown = banded(q, layer, chunk(positions))
    assert not unknown
    slots_of_all = jnp.broadcast_to(jnp.arange(most, dtype=jnp.int32), (3, most))
    mask = attention_mask(jnp.asarray(positions), slots_of_all, window)
    expected, real = whole(q, *everything[1:], mask), positions >= 0
    np.testing.assert_allclose(mixed[real], expected[real], rtol=0, atol=2e-6)


def test_a_memory_is_read_as_far_as_it_is_filled():
    q, k, v = (random(i, *shape) for i, shape in enumerate(shapes(2, 29)))
    slots = jnp.arange(29, dtype=jnp.int32)

    @jax.jit
    def mixed(last):
        positions = last - 1 + jnp.arange(2, dtype=jnp.int32)
        filled = jnp.where(slots <= last, slots, -1)
        mask_spec = MaskSpec(positions, filled, None, key_layout="by_position")
        return blockwise_attention(mix, q, k, v, mask_spec), mix(q, k, v, mask_spec.mask())

    for last in range(1, 29):
        ours, expected = mixed(jnp.asarray(last, jnp.int32))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_one_query_under_a_given_mask_reads_what_it_sees(window):
    # Slots as DeepMind's sampler fills them: one row begins later, padding has repeated positions.
    q, k, v = (random(i, 2, *shape) for i, shape in enumerate(shapes(1, 41)))
    slots = jnp.arange(41, dtype=jnp.int32)[None]
    sizes = set()

    def noted(q, k, v, mask):
        sizes.add(mask.shape[-1])
        return mix(q, k, v, mask)

    @jax.jit
    def mixed(first, last):
        starts = jnp.stack([first, jnp.zeros_like(first)])[:, None]
        real = (slots <= last) & (slots >= starts)
        k_pos = jnp.where(real, slots - starts, 0)
        q_pos = jnp.stack([last - first, last])[:, None]
        mask_spec = MaskSpec(q_pos, k_pos, window, explicit_mask=real[:, None])
        return blockwise_attention(noted, q, k, v, mask_spec), mix(q, k, v, mask_spec.mask())

    for last in range(41):
        for first in (0, last // 2, last, last + 1):  # the last of them sees nothing
            ours, expected = mixed(*(jnp.asarray(one, jnp.int32) for one in (first, last)))
            np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)
    assert sizes == ({5, 10, 41} if window else {6, 11, 21, 41})


def test_packed_texts():
    # Two texts in a row, and padding: each sees its own alone, also where positions are close.
    texts = jnp.asarray([[0] * 9 + [1] * 13 + [-1] * 7])
    positions = jnp.asarray([[*range(9), *range(13), *[-1] * 7]], jnp.int32)
    q, k, v = (random(i, 1, *shape) for i, shape in enumerate(shapes(29, 29)))
    same = texts[:, :, None] == texts[:, None, :]
    for window in (None, 5):
        mask_spec = MaskSpec(
            positions, positions, window, segment_ids=(texts, texts), key_layout="aligned"
        )
        mixed = jax.jit(partial(blockwise_attention, mix))(q, k, v, mask_spec)
        expected = whole(q, k, v, attention_mask(positions, positions, window) & same)
        np.testing.assert_allclose(mixed[:, :22], expected[:, :22], rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma4 experts"])
def test_models(name):
    # Positions that are given may be anything, so there every key is looked at.
    model = tiny.model(tiny.CONFIGS[name])
    tokens = tiny.tokens(2, 29)
    positions = jnp.broadcast_to(jnp.arange(29, dtype=jnp.int32), (2, 29))
    segments = jnp.zeros_like(positions)

    @eqx.filter_jit
    def three(model):
        given, _ = model.trunk(tokens, positions=positions)
        told, _ = model.trunk(tokens, positions=positions, segments=segments)
        return model.trunk(tokens)[0], told, given

    banded, told, given = three(model)
    # Two layers of float32 with weights of 0.4, of hidden states up to 3.
    np.testing.assert_allclose(banded, given, rtol=0, atol=3e-5)
    np.testing.assert_array_equal(told, banded)


def test_positions_that_jump_are_not_banded():
    # The last token is at position 1 again: its window is at the other end of the row.
    config = tiny.model_config(tiny.layer(window=2))
    positions = jnp.asarray([*range(28), 1], jnp.int32)
    tokens, model = tiny.tokens(29), tiny.model(config)

    @eqx.filter_jit
    def last(model, tokens):
        return model.trunk(tokens, positions=positions)[0][-1]

    changed = tokens.at[0].set((tokens[0] + 1) % tiny.VOCAB)
    assert not np.allclose(last(model, tokens), last(model, changed), atol=1e-3)
    far = tokens.at[20].set((tokens[20] + 1) % tiny.VOCAB)
    np.testing.assert_array_equal(last(model, tokens), last(model, far))


def test_segments_belong_to_no_cache():
    tokens = tiny.tokens(3)
    cache = tiny.empty_cache(tiny.GEMMA3, capacity=5)
    with pytest.raises(ValueError, match="leave out segments"):
        tiny.model(tiny.GEMMA3).trunk(tokens, segments=jnp.zeros(3, jnp.int32), cache=cache)


def test_queries_say_what_is_known():
    positions = jnp.arange(3)
    k = jnp.zeros((K, 3, H))
    given = SequenceInfo(positions, jnp.asarray(0), None)
    assert given.keys(k, k).key_layout is None
    assert (
        SequenceInfo(positions, jnp.asarray(0), None, contiguous=True).keys(k, k).key_layout
        == "aligned"
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="these are facts about XLA on CPU")
def test_programs_hold_no_square(monkeypatch):
    monkeypatch.undo()
    length, window = 1301, 64
    layer = tiny.layer(heads=2, kv_heads=1, head_dim=2, window=window)
    shapes_ = eqx.filter_eval_shape(eg.Transformer, tiny.model_config(layer), key=jax.random.key(0))

    def largest(**options) -> int:
        run = jax.jit(lambda model, tokens: model.trunk(tokens, **options)[0])
        tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
        program = as_users_compile(run.lower(shapes_, tokens))
        return max(one.size for one in operations(program))

    # Two heads, and one block of queries at a time.
    assert largest() <= max(2 * 128 * (128 + window), 2 * tiny.HIDDEN * length)
    assert largest(positions=jnp.arange(length)) >= length * length
