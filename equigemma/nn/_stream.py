"""The residual stream between embedding and final norm: what layers read and add to."""

from abc import abstractmethod

import equinox as eqx

from equigemma._kernels import split_batch
from equigemma._typing import Array, Float, Int


class AbstractStream(eqx.Module):
    """The residual stream: made of embeddings before the first layer, reduced after the last."""

    @abstractmethod
    def expand(self, x: Float[Array, "*B L D"]) -> Float[Array, "..."]:
        """The stream before the first layer."""

    @abstractmethod
    def reduce(self, stream: Float[Array, "..."]) -> Float[Array, "*B L D"]:
        """What the final norm reads."""


class PlainStream(AbstractStream):
    """The stream is the embedding plus what each layer adds."""

    def expand(self, x: Float[Array, "*B L D"]):
        return x

    def reduce(self, stream: Float[Array, "*B L D"]):
        return stream


def split_stream(stream: Float[Array, "..."], tokens: Int[Array, "*B L"]) -> Float[Array, "..."]:
    """The stream with its batch split by `split_batch`; `tokens` tell where that is."""
    axis = stream.ndim - tokens.ndim - 1
    return stream if tokens.ndim == 1 else split_batch(stream, axis)
