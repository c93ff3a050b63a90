"""What every layer of one call reads beside the stream, and the part of it that a few tokens need.

Layers after the last one with keys of its own make nothing that another token reads: there only the
tokens are computed whose hidden states are asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp

from equigemma._typing import Array, Float, Int, Shaped
from equigemma.config import AttentionConfig, ModelConfig, RopeConfig
from equigemma.nn._attention import Queries
from equigemma.nn._cache import AbstractKVCache, Keys, LentKeys
from equigemma.nn._rope import Rotation


@dataclass(frozen=True)
class Context:
    """Queries, rotations by head size and kind, and the per-layer vectors, if the model has any."""

    queries: Queries
    turns: Mapping[tuple[int, RopeConfig], Rotation]
    vectors: Float[Array, "*B L J P"] | None

    def turn(self, config: AttentionConfig) -> Rotation:
        """The rotation of a layer's heads."""
        return self.turns[config.head_dim, config.rope]

    def vector(self, layer: int) -> Float[Array, "*B L P"] | None:
        """The per-layer vectors of one layer."""
        return None if self.vectors is None else self.vectors[..., layer, :]

    def only(self, index: Int[Array, "*B R"]) -> "Context":
        """That of a few tokens, which are no keys of this call."""
        turns = {
            kind: Rotation(*(take_tokens(part, index) for part in turn))
            for kind, turn in self.turns.items()
        }
        vectors = self.vectors
        if vectors is not None:
            vectors = jnp.take_along_axis(vectors, index[..., None, None], axis=-3)
        return Context(_only(self.queries, index), turns, vectors)


def first_without_keys(config: ModelConfig) -> int:
    """The layer from which on all look at the keys of others; the number of layers if none does."""
    return 1 + max(index for index in range(len(config.layers)) if config.owner(index) == index)


def take_tokens(x: Shaped[Array, "..."], index: Int[Array, "*B R"]) -> Shaped[Array, "..."]:
    """A few tokens of `[*B L D]`, or of several such streams, `[A *B L D]`."""
    streams = [1] * (x.ndim - 1 - index.ndim)
    return jnp.take_along_axis(x, index.reshape(*streams, *index.shape, 1), axis=-2)


def lent(memories: Sequence[AbstractKVCache | None]) -> list[AbstractKVCache | None]:
    """The same memories, for queries that are not all of the call's tokens."""
    return [_unordered(one) if isinstance(one, LentKeys) else one for one in memories]


def _unordered(memory: LentKeys) -> LentKeys:
    keys = memory.keys
    if keys is None or keys.order != "steps":
        return memory
    return LentKeys(memory.own, Keys(keys.k, keys.v, keys.positions, None, keys.masked_by))


def _only(queries: Queries, index: Int[Array, "*B R"]) -> Queries:
    ends, mask = queries.block_end, queries.mask
    return replace(
        queries,
        positions=jnp.take_along_axis(queries.positions, index, axis=-1),
        mask=None if mask is None else take_tokens(mask, index),
        block_end=None if ends is None else jnp.take_along_axis(ends, index, axis=-1),
        in_steps=False,
    )
