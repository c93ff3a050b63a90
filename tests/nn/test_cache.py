"""Slots against a simulation, and the cache as a value: donated, forked, compared, saved."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma.nn import KVCache, capacity, init_cache
from equigemma.nn._cache import KeysValues, length_after, slot_positions


EMPTY = -1


def held_after(length: int, slots: int) -> list[int]:
    """Positions 0 to length − 1 written one after the other, each over what was in its slot."""
    held = [EMPTY] * slots
    for position in range(length):
        held[position % slots] = position
    return held


@pytest.mark.parametrize("slots", [1, 5, 11])
def test_slot_positions_by_simulation(slots):
    lengths = np.arange(24).reshape(2, 3, 4)
    positions = jax.jit(slot_positions, static_argnums=1)(tiny.host(lengths, np.int32), slots)
    assert positions.shape == (2, 3, 4, slots)
    for index, length in np.ndenumerate(lengths):
        assert np.asarray(positions)[index].tolist() == held_after(length, slots)


def test_advance_by_hand():
    # Two new tokens, one and padding, padding and one, only padding.
    positions = jnp.asarray([[3, 4], [3, EMPTY], [EMPTY, 3], [EMPTY, EMPTY]])
    assert length_after(jnp.full(4, 3), positions).tolist() == [5, 4, 4, 3]


def empty_layer(rows: int, slots: int) -> KVCache:
    zeros = np.zeros((rows, 2, slots, 3))
    return KVCache(tiny.host(zeros, np.float32), tiny.host(zeros, np.float32))


class Simulation:
    """One row of one layer: a list of slots, and in each the position written last."""

    def __init__(self, slots: int):
        self.slots = [EMPTY] * slots
        self.length = 0

    def update(self, positions: list[int]) -> None:
        for position in positions:
            if position != EMPTY:
                assert position == self.length
                self.slots[position % len(self.slots)] = position
                self.length += 1


def random_chunks(rng, rows: int, sizes) -> list[np.ndarray]:
    """Positions of successive chunks: each row has a run of real tokens, padding on both sides."""
    lengths = np.zeros(rows, int)
    chunks = []
    for size in sizes:
        positions = np.full((rows, size), EMPTY)
        for row in range(rows):
            real = rng.integers(0, size + 1)
            start = rng.integers(0, size - real + 1)
            positions[row, start : start + real] = lengths[row] + np.arange(real)
            lengths[row] += real
        chunks.append(positions)
    return chunks


@jax.jit
def update(layer, length, positions):
    """Extends by tokens whose keys are their position and whose values are its negative."""
    k = positions[:, None, :, None].astype(jnp.float32) * jnp.ones((1, 2, 1, 3))
    keys, layer = layer.update(KeysValues(k, -k, positions), length, 5)
    return keys, layer, length_after(length, positions)


@pytest.mark.parametrize("slots", [5, 11])
def test_extend_by_simulation(slots):
    # Chunks of one, shorter and longer than window and ring: both orders of writing and looking.
    rng = np.random.default_rng(slots)
    rows, sizes = 7, [3, 1, 13, 3, 1, 1, 7, 1, 13, 3, 7]
    layer = empty_layer(rows, slots)
    length = tiny.host(np.zeros(rows), np.int32)
    simulations = [Simulation(slots) for _ in range(rows)]
    for positions in random_chunks(rng, rows, sizes):
        before = [simulation.length for simulation in simulations]
        keys, layer, length = update(layer, length, tiny.host(positions, np.int32))
        keys, ring_keys = jax.device_get(keys), np.asarray(layer.k)
        seen = keys.positions
        # Whatever is said to be at a position has the keys and values of that position.
        real = seen != EMPTY
        for head in range(2):
            np.testing.assert_array_equal(keys.k[:, head, :, 0][real], seen[real])
            np.testing.assert_array_equal(keys.v[:, head, :, 2][real], -seen[real])
        for row, simulation in enumerate(simulations):
            simulation.update(positions[row].tolist())
            assert int(length[row]) == simulation.length
            # What the ring holds, slot by slot, where something was written.
            ring = ring_keys[row, 0, :, 0].tolist()
            for slot, position in enumerate(simulation.slots):
                if position != EMPTY:
                    assert ring[slot] == position
            # Every key that some new query needs can be seen, and none twice.
            visible = seen[row][real[row]].tolist()
            assert len(set(visible)) == len(visible)
            if simulation.length > before[row]:
                needed = range(max(0, before[row] - 5 + 1), simulation.length)
                assert set(needed) <= set(visible)


def test_a_step_into_a_ring_copies_no_keys():
    # A single token may be written before it looks, into a ring of just the window.
    layer = empty_layer(1, 5)
    keys, layer, _ = update(layer, jnp.asarray([7]), jnp.asarray([[7]]))
    assert keys.k.shape == layer.k.shape
    assert sorted(np.asarray(keys.positions)[0].tolist()) == [3, 4, 5, 6, 7]


def test_slots_that_bound_the_text_are_written_first():
    # Fewer slots than the window: the text must fit, so nothing is ever overwritten.
    layer = empty_layer(1, 3)
    keys, layer, _ = update(layer, jnp.asarray([0]), jnp.asarray([[0, 1]]))
    assert keys.k.shape == layer.k.shape
    assert keys.positions.tolist() == [[0, 1, EMPTY]]


def test_init_cache():
    config = tiny.GEMMA3
    cache = init_cache(config, (2, 3), capacity=11, dtype=jnp.bfloat16)
    assert [layer.capacity for layer in cache.layers] == [5, 11]
    assert cache.layers[0].k.shape == (2, 3, 3, 5, 10)
    assert cache.layers[0].v.dtype == jnp.bfloat16
    assert cache.length.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert capacity(config, cache) == 11
    # Local layers need no more than the text.
    small = init_cache(config, capacity=2)
    assert [layer.capacity for layer in small.layers] == [2, 2]
    assert repr(cache).startswith("Cache(2 layers, length=")


@pytest.mark.parametrize("slots", [0, -7])
def test_a_cache_without_room_is_refused(slots):
    with pytest.raises(ValueError, match=f"at least one token, got capacity={slots}"):
        init_cache(tiny.GEMMA3, capacity=slots)


def step(cache: eg.Cache, token: int) -> eg.Output:
    return tiny.run(tiny.model(tiny.GEMMA3), jnp.asarray([token]), cache=cache)


@pytest.fixture(scope="module")
def cache() -> eg.Cache:
    """A cache after four tokens."""
    cache = tiny.empty_cache(tiny.GEMMA3, capacity=11)
    for token in (3, 1, 4, 1):
        after = step(cache, token).cache
        assert after is not None
        cache = after
    return cache


def test_a_cache_can_be_forked(cache):
    before = jax.tree.map(np.array, cache)
    first, second = step(cache, 5), step(cache, 9)
    assert not eqx.tree_equal(first.cache, second.cache)
    # The original is untouched, and the same step gives the same again.
    assert eqx.tree_equal(jax.tree.map(np.array, cache), before)
    assert eqx.tree_equal(step(cache, 5).cache, first.cache)


def test_a_donated_cache_is_updated_in_place(cache):
    donated = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), cache)
    expected = step(cache, 5)

    donating = jax.jit(
        lambda cache, token: tiny.model(tiny.GEMMA3)(token, cache=cache), donate_argnums=0
    )
    output = donating(donated, jnp.asarray([5]))
    # All buffers were handed over; a buffer that could not be reused would have been a warning.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    # Another program for the same sums: logits of size 5 differ in their last bits.
    np.testing.assert_allclose(output.logits, expected.logits, rtol=0, atol=1e-5)


def test_a_cache_can_be_saved(cache):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, cache)
    file.seek(0)
    restored = eqx.tree_deserialise_leaves(file, tiny.empty_cache(tiny.GEMMA3, capacity=11))
    assert eqx.tree_equal(restored, cache)
    assert not eqx.tree_equal(restored, tiny.empty_cache(tiny.GEMMA3, capacity=11))


def test_a_full_cache_is_refused(cache):
    model = tiny.model(tiny.GEMMA3)
    with pytest.raises(ValueError, match="capacity of 11 tokens, and these would make it 12"):
        model(jnp.arange(8), cache=cache)
    # Padding takes no room.
    positions = jnp.asarray([4, 5, 6, 7, 8, 9, 10, EMPTY])
    assert tiny.run(model, jnp.arange(8), cache=cache, positions=positions).cache.length == 11


def test_a_cache_of_local_layers_alone_is_never_full():
    config = tiny.model_config(tiny.layer(window=5), tiny.layer(window=3))
    cache = tiny.empty_cache(config, capacity=7)
    for _ in range(9):
        cache = tiny.run(tiny.model(config), jnp.asarray([1]), cache=cache).cache
    assert int(cache.length) == 9


@pytest.mark.parametrize(
    ("config", "batch", "message"),
    [
        (tiny.model_config(tiny.layer()), (), "a model with 1 layers, this model has 2"),
        (
            tiny.model_config(*[tiny.layer(kv_heads=1)] * 2),
            (),
            r"layer 0 has keys of shape \(1, 11",
        ),
        (tiny.GEMMA3, (2,), r"a batch of shape \(2,\), `tokens` one of \(\)"),
    ],
)
def test_a_foreign_cache_is_refused(config, batch, message):
    foreign = tiny.empty_cache(config, batch, capacity=11)
    with pytest.raises(ValueError, match=message):
        tiny.model(tiny.GEMMA3)(jnp.arange(3), cache=foreign)
