"""Inputs that all layers of a call share, and the part of them that a few tokens need.

Layers after the last one with keys of its own make nothing that another token reads: there only the
tokens are computed whose hidden states are asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp

from equigemma._typing import Array, Float, Int, Shaped
from equigemma.config import AttentionConfig, ModelConfig, RopeConfig
from equigemma.nn._attention import SequenceInfo
from equigemma.nn._cache import AbstractKVCache, KeysValues, SharedKVCache
from equigemma.nn._rope import SinCos


@dataclass(frozen=True)
class Context:
    """Queries, rotations by head size and kind, and the per-layer vectors, if the model has any."""

    sequence: SequenceInfo
    ropes: Mapping[tuple[int, RopeConfig], SinCos]
    per_layer_inputs: Float[Array, "*B L J P"] | None

    def rope(self, config: AttentionConfig) -> SinCos:
        """The rotation of a layer's heads."""
        return self.ropes[config.head_dim, config.rope]

    def per_layer_input(self, layer: int) -> Float[Array, "*B L P"] | None:
        """The per-layer vectors of one layer."""
        return None if self.per_layer_inputs is None else self.per_layer_inputs[..., layer, :]

    def only(self, index: Int[Array, "*B R"]) -> "Context":
        """The context of a few tokens, whose keys are not appended."""
        ropes = {
            kind: SinCos(*(take_tokens(part, index) for part in rope))
            for kind, rope in self.ropes.items()
        }
        per_layer_inputs = self.per_layer_inputs
        if per_layer_inputs is not None:
            per_layer_inputs = jnp.take_along_axis(
                per_layer_inputs, index[..., None, None], axis=-3
            )
        return Context(_only(self.sequence, index), ropes, per_layer_inputs)


def first_without_keys(config: ModelConfig) -> int:
    """The first of the last layers without keys of their own; if none, the number of layers."""
    return 1 + max(index for index in range(len(config.layers)) if config.owner(index) == index)


def take_tokens(x: Shaped[Array, "..."], index: Int[Array, "*B R"]) -> Shaped[Array, "..."]:
    """A few tokens of `[*B L D]`, or of several such streams, `[A *B L D]`."""
    streams = [1] * (x.ndim - 1 - index.ndim)
    return jnp.take_along_axis(x, index.reshape(*streams, *index.shape, 1), axis=-2)


def lent(layer_caches: Sequence[AbstractKVCache | None]) -> list[AbstractKVCache | None]:
    """The same caches, for queries that are not all of the call's tokens."""
    return [_unordered(one) if isinstance(one, SharedKVCache) else one for one in layer_caches]


def _unordered(layer_cache: SharedKVCache) -> SharedKVCache:
    keys = layer_cache.keys
    if keys is None or keys.key_layout != "aligned":
        return layer_cache
    return SharedKVCache(
        layer_cache.own, KeysValues(keys.k, keys.v, keys.positions, None, keys.masked_by)
    )


def _only(sequence: SequenceInfo, index: Int[Array, "*B R"]) -> SequenceInfo:
    ends, mask = sequence.block_end, sequence.mask
    return replace(
        sequence,
        positions=jnp.take_along_axis(sequence.positions, index, axis=-1),
        mask=None if mask is None else take_tokens(mask, index),
        block_end=None if ends is None else jnp.take_along_axis(ends, index, axis=-1),
        contiguous=False,
    )
