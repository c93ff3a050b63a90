"""An SAE within a model: features read on the way, changed, and decoded in place of the value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float
from equigemma.interpret._activations import activations
from equigemma.interpret._change import At, at
from equigemma.interpret._sites import find
from equigemma.interpret.sae._modules import AbstractSAE, add_skip
from equigemma.nn import Transformer


@dataclass(frozen=True)
class Place:
    """The sites that an SAE reads and writes; a transcoder writes another one than it reads.

    `without_weight`: what it reads is a norm's output divided by the norm's weight, as the
    transcoders of Gemma Scope 1 do.
    """

    reads: str
    writes: str
    without_weight: bool = False


Features = Callable[[Float[Array, "*B L n"]], Float[Array, "*B L n"]]


def features(
    sae: AbstractSAE, place: Place, function: Callable[[Any], Any], model: Transformer
) -> tuple[Any, Float[Array, "*B L n"]]:
    """`function(model)`, and the features of what the SAE reads on the way.

    **Arguments:**

    - `sae`: as from `load`.
    - `place`: the sites that it reads and writes.
    - `function`: calls its argument, such as `lambda model: model(tokens)`.
    - `model`: that which the SAE was trained on.

    **Returns:** the result of `function`, and the features, n for each token.

    **Raises:** as `interpret.activations`; `ValueError` for an SAE of another width.
    """
    result, values = activations(function, model, [place.reads])
    return result, sae.encode(_read(sae, place, values[place.reads], _norm_weight(place, model)))


def splice(
    sae: AbstractSAE, place: Place, model: Transformer, change: Features | None = None
) -> dict[str, At]:
    """Changes for `interpret.patch` that put the SAE into `model`, with its error term.

    The value at `place.writes` becomes `x̂ + stop_gradient(x − x̂)`: as before up to rounding, and
    gradients go through the features. With `change`, features are others, and the error is that of
    the features as they were: to ablate or steer them changes nothing else.

    ```python
    changes = sae.splice(scope, place, model, lambda f: f.at[..., 7].set(0.0))
    interpret.patch(lambda model: model(tokens), model, changes)
    ```

    **Arguments:**

    - `sae`: as from `load`.
    - `place`: the sites that it reads and writes.
    - `model`: that which the SAE was trained on.
    - `change`: a function of the features `[*B L n]`.

    **Returns:** changes by site, one or two.

    **Raises:** `ValueError` for an SAE of another width, or a site that the model does not have.
    """
    for site in (place.reads, place.writes):
        find(model, site)
    weight = _norm_weight(place, model)
    if place.reads == place.writes:
        return {place.writes: at(_Spliced(sae, weight, change, place, None))}
    held = _Held()
    return {
        place.reads: at(held.keep),
        place.writes: at(_Spliced(sae, weight, change, place, held)),
    }


def inputs(
    sae: AbstractSAE, place: Place, model: Transformer, value: Float[Array, "..."]
) -> Float[Array, "*B L d"]:
    """What an SAE makes of the value at the site that it reads: heads side by side, and without the
    norm's weight where it reads so.

    **Arguments:**

    - `sae`: the SAE.
    - `place`: its sites.
    - `model`: the model that the value is of.
    - `value`: the value at `place.reads`.

    **Returns:** what `sae.encode` takes.

    **Raises:** `ValueError` for an SAE of another width.
    """
    return _read(sae, place, value, _norm_weight(place, model))


class _Held:
    """What a transcoder reads, until it is the turn of the site that it writes: in one trace."""

    def __init__(self):
        self.value: Array | None = None

    def keep(self, x: Array) -> Array:
        """`x`, and notes it."""
        self.value = x
        return x

    def take(self) -> Array:
        """What was noted, once."""
        value, self.value = self.value, None
        assert value is not None, "a layer reaches the input of its feed-forward before the output"
        return value


class _Spliced(eqx.Module):
    """What `patch` calls with the value at the site that is written. Weights are its leaves."""

    sae: AbstractSAE
    weight: Float[Array, " d"] | None
    change: Features | None
    place: Place = eqx.field(static=True)
    held: _Held | None = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        sae = self.sae
        inputs = _read(sae, self.place, x if self.held is None else self.held.take(), self.weight)
        before = sae.encode(inputs)
        after = before if self.change is None else self.change(before)
        flat = x.reshape(*inputs.shape[:-1], -1).astype(sae.w_dec.dtype)
        whole, again = (add_skip(sae.decode(part), sae, inputs) for part in (before, after))
        return (again + jax.lax.stop_gradient(flat - whole)).reshape(x.shape)


def _norm_weight(place: Place, model: Transformer) -> Float[Array, " D"] | None:
    """What the norm whose output is read multiplies with, if the SAE reads without that."""
    if not place.without_weight:
        return None
    if not place.reads.endswith(".mlp_normed"):
        raise ValueError(
            f"{place.reads} is no output of a norm: `without_weight` is for sites like "
            "layers.3.mlp_normed."
        )
    norm = _block(model, place).pre_ffw_norm
    if norm.scale is None or norm.config.offset is None:
        return None
    return norm.config.offset + norm.scale.astype(jnp.float32)


def _read(
    sae: AbstractSAE, place: Place, x: Array, weight: Float[Array, " d"] | None
) -> Float[Array, "*B L d"]:
    """A value at a site as the SAE takes it: heads side by side, the norm's weight taken out."""
    if place.reads.endswith(".z"):
        x = x.reshape(*x.shape[:-2], -1)
    if x.shape[-1] != sae.w_enc.shape[0]:
        raise ValueError(
            f"{place.reads} is {x.shape[-1]} wide, and the SAE reads {sae.w_enc.shape[0]}: it is "
            "one of another model or site."
        )
    return x if weight is None else x.astype(weight.dtype) / jnp.broadcast_to(weight, x.shape)


def _block(model: Transformer, place: Place) -> Any:
    """The layer of the site that is read."""
    return model.layers[int(place.reads.split(".")[1])]
