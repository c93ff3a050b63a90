"""KV caches of one layer, immutable: a ring buffer of keys and values, or full length.

Position p of a row lives in slot p mod capacity. A global layer has room for
everything and never wraps; a local layer keeps a ring of its window. Both are the same type. Which
position a slot holds follows from the number of tokens, so nothing but keys, values and one
length per row is stored. Keys are stored rotated, so their order in the ring does not matter.
"""

from abc import abstractmethod
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import update_slot
from equigemma._typing import Array, Bool, Float, Float32, Int, Int8, Shaped, typed


KeyLayout = Literal["aligned", "by_position"]
"""What is known of where keys are. `"aligned"`: the last L of them are those of the L queries, one
by one, and the keys that a query attends to are as far from it in slots as in positions.
`"by_position"`: slot p holds position p.
"""


class KeysValues(eqx.Module):
    """Keys and values that the queries of one layer attend to. Position −1 marks an empty slot."""

    k: Float[Array, "*B K S H"]
    v: Float[Array, "*B K S H"]
    positions: Int[Array, "*B S"]
    key_layout: KeyLayout | None = eqx.field(static=True, default=None)
    masked_by: Literal["keys", "by_position"] = eqx.field(static=True, default="keys")

    def columns(self, mask: Bool[Array, "*B L all"]) -> Bool[Array, "*B L S"]:
        """The part of a mask that is about these keys. Its columns are those of the keys, or, where
        it is `masked_by` positions, one for each position; a slot without a key is masked then.
        """
        if self.masked_by == "keys":
            return mask
        there = (self.positions >= 0)[..., None, :]
        if self.key_layout == "by_position" and mask.shape[-1] == self.positions.shape[-1]:
            return mask & there
        index = jnp.maximum(self.positions, 0)[..., None, :]
        return jnp.take_along_axis(mask, index, axis=-1, mode="fill", fill_value=False) & there


class AbstractKVCache(eqx.Module):
    """KV cache of one layer."""

    @abstractmethod
    def update(
        self, new: KeysValues, length: Int[Array, "*B"], window: int | None
    ) -> tuple[KeysValues, "AbstractKVCache"]:
        """All keys that the new queries attend to, and the cache after them.

        `new.positions` continue the `length` tokens before them; −1 marks padding, before or
        after the run of real tokens, never within it.
        """


class AbstractRing(AbstractKVCache):
    """Keys and values of the newest positions, slot = position mod capacity."""

    k: eqx.AbstractVar[Shaped[Array, "*B K S H"]]
    v: eqx.AbstractVar[Shaped[Array, "*B K S H"]]

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.k.shape[-2]

    def limits_sequence_length(self, window: int | None) -> bool:
        """Whether the sequence must fit into the slots, as its queries attend to more than they
        hold.
        """
        return window is None or self.capacity < window


class KVCache(AbstractRing):
    """The newest keys and values, as they are."""

    k: Float[Array, "*B K S H"]
    v: Float[Array, "*B K S H"]

    def update(
        self, new: KeysValues, length: Int[Array, "*B"], window: int | None
    ) -> tuple[KeysValues, "KVCache"]:
        """Appends `new`.

        Writing first and looking afterwards loses nothing if no query of this call still needs a
        key that the call overwrites, that is if capacity ≥ window + L − 1. Otherwise the queries
        attend to the old keys and then the new ones, and the ring is written afterwards. Where the
        slots bound the text nothing is ever overwritten.
        """
        chunk = new.k.shape[-2]
        total = length_after(length, new.positions)
        written = KVCache(
            _write(self.k, new.k, new.positions, total), _write(self.v, new.v, new.positions, total)
        )
        positions = slot_positions(total, self.capacity)
        if window is None or self.limits_sequence_length(window):
            return KeysValues(
                written.k, written.v, positions, "by_position", "by_position"
            ), written
        if self.capacity >= window + chunk - 1:
            return KeysValues(written.k, written.v, positions, None, "by_position"), written
        side_by_side = jnp.concatenate([self.k, new.k], -2), jnp.concatenate([self.v, new.v], -2)
        sources, positions = _contiguous(length, new.positions, self.capacity)
        k, v = (jnp.take_along_axis(x, sources[..., None, :, None], -2) for x in side_by_side)
        return KeysValues(k, v, positions, "aligned", "by_position"), written


class Int8KVCache(AbstractRing):
    """The newest keys and values in 8 bits, each vector with a scale of its own.

    That is half of bfloat16's memory. Queries attend to the rounded ones from the first, so that
    chunks make no difference.
    """

    k: Int8[Array, "*B K S H"]
    v: Int8[Array, "*B K S H"]
    k_scale: Float32[Array, "*B K S 1"]
    v_scale: Float32[Array, "*B K S 1"]

    def update(
        self, new: KeysValues, length: Int[Array, "*B"], window: int | None
    ) -> tuple[KeysValues, "Int8KVCache"]:
        """Appends `new`, rounded."""
        total = length_after(length, new.positions)
        (k, k_scale), (v, v_scale) = _quantize(new.k), _quantize(new.v)
        pairs = (self.k, k), (self.v, v), (self.k_scale, k_scale), (self.v_scale, v_scale)
        written = Int8KVCache(*(_write(*pair, new.positions, total) for pair in pairs))
        dtype, chunk = new.k.dtype, new.k.shape[-2]
        # Where nothing is lost by it, what is written is attended to: the old slots, needed after
        # that, would be copied. To write the same once more into floats changes nothing.
        keeps = (
            window is None
            or self.limits_sequence_length(window)
            or self.capacity >= window + chunk - 1
        )
        slots = written if keeps else self
        floats = KVCache(
            _dequantize(slots.k, slots.k_scale, dtype), _dequantize(slots.v, slots.v_scale, dtype)
        )
        rounded = _dequantize(k, k_scale, dtype), _dequantize(v, v_scale, dtype)
        new = eqx.tree_at(lambda keys: (keys.k, keys.v), new, rounded)
        return floats.update(new, length, window)[0], written


class SharedKVCache(AbstractKVCache):
    """The cache of a layer whose keys later layers attend to too: it keeps what its queries
    attended to.

    `own` is the layer's KV cache between calls, None without a cache; `keys` is for those layers.
    """

    own: AbstractKVCache | None
    keys: KeysValues | None = None

    def update(
        self, new: KeysValues, length: Int[Array, "*B"], window: int | None
    ) -> tuple[KeysValues, "SharedKVCache"]:
        """As `own` does it, or just `new`."""
        keys, own = (new, None) if self.own is None else self.own.update(new, length, window)
        return keys, SharedKVCache(own, keys)


@typed
def length_after(length: Int[Array, "*B"], positions: Int[Array, "*B L"]) -> Int[Array, "*B"]:
    """Number of tokens after a call: one more than the last position; as before for padding."""
    return jnp.maximum(length, positions.max(axis=-1) + 1)


@typed
def slot_positions(length: Int[Array, "*B"], capacity: int) -> Int[Array, "*B {capacity}"]:
    """The position that each slot holds after `length` tokens; −1 where it is empty."""
    last = length[..., None] - 1
    slots = jnp.broadcast_to(jnp.arange(capacity, dtype=length.dtype), (*length.shape, capacity))
    held = last - (last - slots) % capacity
    return jnp.maximum(held, -1)


def _quantize(
    x: Float[Array, "*B K L H"],
) -> tuple[Int8[Array, "*B K L H"], Float32[Array, "*B K L 1"]]:
    """Each vector as integers up to 127, and what one of them is worth."""
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return jnp.round(wide / scale).astype(jnp.int8), scale


def _dequantize(numbers: Array, scale: Array, dtype: jnp.dtype) -> Float[Array, "*B K L H"]:
    return (numbers.astype(jnp.float32) * scale).astype(dtype)


def _contiguous(
    length: Int[Array, "*B"], new: Int[Array, "*B L"], capacity: int
) -> tuple[Int[Array, "*B S"], Int[Array, "*B S"]]:
    """Old keys and new ones in the order of their positions: of each where it is in the ring and
    the chunk side by side, and its position. The old ones end where the run of new ones begins,
    also behind padding.
    """
    start = jnp.argmax(new >= 0, axis=-1).astype(new.dtype)[..., None]
    slots = jnp.arange(capacity + new.shape[-1], dtype=new.dtype)
    slots = jnp.broadcast_to(slots, (*new.shape[:-1], slots.size))
    is_old = slots < capacity + start
    old = length[..., None] - capacity - start + slots
    kept = (old >= 0) & (old >= length[..., None] - capacity)
    padded = jnp.concatenate([jnp.full((*new.shape[:-1], capacity), -1, new.dtype), new], axis=-1)
    positions = jnp.where(is_old, jnp.where(kept, old, -1), padded)
    return jnp.where(is_old, old % capacity, slots), positions


def _write(
    slots: Shaped[Array, "*B K S H"],
    new: Shaped[Array, "*B K L H"],
    positions: Int[Array, "*B L"],
    total: Int[Array, "*B"],
) -> Shaped[Array, "*B K S H"]:
    write = _write_one if new.shape[-2] == 1 else _write_chunk
    for _ in range(positions.ndim - 1):
        write = jax.vmap(write)
    return write(slots, new.astype(slots.dtype), positions, total)


def _write_one(
    slots: Shaped[Array, "K S H"],
    new: Shaped[Array, "K L H"],
    positions: Int[Array, " L"],
    total: Int[Array, ""],
):
    del total
    slot = jnp.maximum(positions[0], 0) % slots.shape[-2]
    return update_slot(slots, new, slot, axis=-2, real=positions[0] >= 0)


def _write_chunk(
    slots: Shaped[Array, "K S H"],
    new: Shaped[Array, "K L H"],
    positions: Int[Array, " L"],
    total: Int[Array, ""],
):
    # Seen from the slots: each takes the newest position that maps to it, if the chunk has it.
    # Unlike a slice update this wraps, skips padding, and takes a chunk longer than the ring.
    held = slot_positions(total, slots.shape[-2])
    start = jnp.argmax(positions >= 0)
    source = held - positions[start] + start
    from_chunk = (held >= positions[start]) & (positions[start] >= 0)
    taken = jnp.take(new, jnp.clip(source, 0, new.shape[-2] - 1), axis=-2)
    return jnp.where(from_chunk[None, :, None], taken, slots)
