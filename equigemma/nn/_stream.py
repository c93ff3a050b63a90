"""The residual stream between embedding and final norm: what layers read and add to."""

from abc import abstractmethod

import equinox as eqx

from equigemma._typing import Array, Float


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
