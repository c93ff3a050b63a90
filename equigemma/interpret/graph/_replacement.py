"""The model, linear on one text: frozen norms and patterns, feed-forwards that are inputs."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float
from equigemma.interpret._activations import activations
from equigemma.interpret._lens import factor
from equigemma.interpret._patch import patch
from equigemma.interpret._steering import Shift
from equigemma.interpret.sae import AbstractSAE, Place, inputs
from equigemma.nn import RMSNorm, Transformer


Transcoders = Sequence[tuple[AbstractSAE, Place]]
"""For each layer the transcoder of its feed-forward, and the sites that it reads and writes."""


class FrozenRMSNorm(RMSNorm):
    """A norm through whose statistics no gradient flows: a linear map."""

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The same values as the norm gives, up to rounding."""
        fixed = jax.lax.stop_gradient(factor(self, x))
        return (x.astype(fixed.dtype) * fixed).astype(x.dtype)


def frozen(model: Transformer) -> Transformer:
    """`model` with frozen norms."""

    def is_norm(node: Any) -> bool:
        return isinstance(node, RMSNorm)

    def freeze(node: Any) -> Any:
        if not is_norm(node):
            return node
        new = object.__new__(FrozenRMSNorm)
        for name in ("scale", "config"):
            object.__setattr__(new, name, getattr(node, name))
        return new

    return jax.tree.map(freeze, model, is_leaf=is_norm)


class Shifts(eqx.Module):
    """What is added to the embedding, and to what each feed-forward writes."""

    embed: Float[Array, "L D"]
    written: Float[Array, "J L D"]


def read_linear(
    model: Transformer, transcoders: Transcoders, tokens: Array, shifts: Shifts
) -> tuple[list[Array], Array]:
    """What each transcoder reads, `[L d]`, and the output of the final norm, `[L D]`.

    Values are those of the model; as functions of `shifts` they are linear.
    """
    linear = frozen(model)
    changes: dict[str, Any] = {"embed": Shift(shifts.embed), "layers.*.pattern": _fixed}
    for (sae, place), shift in zip(transcoders, shifts.written, strict=True):
        written = _Written(sae, place, model, shift)
        changes |= {place.reads: written.keep, place.writes: written}
    names = [*(place.reads for _, place in transcoders), "final_norm"]

    def run(model: Any) -> dict[str, Array]:
        return activations(lambda m: m.trunk(tokens)[0], model, names)[1]

    values = patch(run, linear, changes)
    read = [inputs(sae, place, model, values[place.reads]) for sae, place in transcoders]
    return read, values["final_norm"]


def _fixed(x: Array) -> Array:
    return jax.lax.stop_gradient(x)


class _Written:
    """What a feed-forward writes: its value, linear in what the skip connection reads."""

    def __init__(self, sae: AbstractSAE, place: Place, model: Transformer, shift: Array):
        self._sae, self._place, self._model, self._shift = sae, place, model, shift
        self._read: Array | None = None

    def keep(self, x: Array) -> Array:
        """`x`, and notes it."""
        self._read = x
        return x

    def __call__(self, x: Array) -> Array:
        new = jax.lax.stop_gradient(x) + self._shift.astype(x.dtype)
        if self._sae.skip is None:
            return new
        assert self._read is not None, "a feed-forward reads before it writes"
        skipped = inputs(self._sae, self._place, self._model, self._read) @ self._sae.skip
        return new + (skipped - jax.lax.stop_gradient(skipped)).astype(x.dtype)


def no_shifts(model: Transformer, length: int) -> Shifts:
    """Zeros."""
    layers, width = len(model.layers), model.config.width
    shape = (length, width)
    return Shifts(jnp.zeros(shape, model.dtype), jnp.zeros((layers, *shape), model.dtype))
