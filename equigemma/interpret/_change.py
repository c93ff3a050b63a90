"""Changes of a value at a site: what replaces it, at which positions, heads and features."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from equigemma._arguments import described
from equigemma._typing import Array, Bool, Float, Int
from equigemma.interpret._sites import Axis, Site


class Tokens(NamedTuple):
    """Which tokens the rows of a value are of, and which ones a pattern's columns are of.

    `complete`: the whole text is in this call, as without a cache. `length`: positions are known
    to be 0 … length − 1.
    """

    positions: Int[Array, "*B L"]
    keys: Int[Array, "*B S"] | None = None
    complete: bool = False
    length: int | None = None


class At(eqx.Module):
    """A change at chosen places of a site. Make one with `at`."""

    change: Any
    positions: Int[Array, "..."] | None
    heads: Int[Array, " heads"] | None
    features: Int[Array, " features"] | None
    keys: Int[Array, "..."] | None
    stream: int | None = eqx.field(static=True)

    def chosen(self) -> dict[Axis, Int[Array, "..."]]:
        """Indices by axis, of the axes on which there is a choice."""
        by_axis: dict[Axis, Any] = {
            "position": self.positions,
            "head": self.heads,
            "feature": self.features,
            "key": self.keys,
        }
        return {axis: index for axis, index in by_axis.items() if index is not None}


def at(
    change: Any,
    *,
    positions: Any = None,
    heads: Any = None,
    features: Any = None,
    keys: Any = None,
    stream: int | None = None,
) -> At:
    """`change` at chosen places only, for `patch`.

    Indices are integers or arrays of them, values of a trace too, so that `vmap` can run over them.
    Where several axes have a choice, all combinations are changed.

    ```python
    >>> import jax.numpy as jnp
    >>> from equigemma import interpret
    >>> ablated = interpret.at(0.0, heads=[0, 3])
    >>> steered = interpret.at(lambda x: x + 1.0, positions=range(4, 9))

    ```

    **Arguments:**

    - `change`: numbers that replace the value, with an axis for each axis of the site (one of the
      chosen length where there is a choice), or fewer that broadcast; or a function of the whole
      value, of whose result the chosen places are taken. A function that is an Equinox module is
      part of the model: its arrays may change without compiling anew. Other functions are compiled
      once for each object.
    - `positions`: of tokens in their text, counted from 0, soft tokens of images included; the same
      with and without a cache. A single axis, or one after those of the batch.
    - `heads`: query heads; key/value heads at `k` and `v`.
    - `features`: entries of the last axis.
    - `keys`: of `pattern`, the positions of the tokens attended to.
    - `stream`: of AltUp, which of the parallel streams; the active one is 0.

    **Returns:** a value for the `changes` of `patch`.

    **Raises:** `TypeError` for indices that are not integers; `ValueError` for negative positions.
    """
    indices = {
        name: None if value is None else _as_indices(name, value)
        for name, value in dict(
            positions=positions, heads=heads, features=features, keys=keys
        ).items()
    }
    for name in ("positions", "keys"):
        index = indices[name]
        if index is not None and not isinstance(index, Tracer) and (np.asarray(index) < 0).any():
            raise ValueError(
                f"`{name}` count from the beginning of a text, 0 is its first token; got "
                f"{np.asarray(index).min()}."
            )
    return At(_as_change(change), stream=stream, **indices)


def as_at(change: Any) -> At:
    """A change of all places, unless it is one of chosen places already."""
    return change if isinstance(change, At) else at(change)


class _Function(eqx.Module):
    """A function whose arrays are leaves; everything else about it is static."""

    arrays: Any
    others: Any = eqx.field(static=True)

    def __call__(self, x: Array) -> Any:
        return eqx.combine(self.arrays, self.others)(x)


def _as_change(change: Any) -> Any:
    if isinstance(change, _Function):
        return change
    if callable(change):
        return _Function(*eqx.partition(change, eqx.is_array))
    try:
        value = jnp.asarray(change)
    except (TypeError, ValueError):
        value = None
    kinds = jnp.floating, jnp.integer
    if value is None or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        raise TypeError(
            "A change must be an array of numbers, a function of one, or `at(...)` of either; got "
            f"{described(change)}."
        )
    return value


def _as_indices(name: str, value: Any) -> Any:
    """At least one axis of int32: of NumPy, where values are known, so that they stay so in jit."""
    index = jnp.asarray(value) if isinstance(value, Tracer) else np.asarray(value)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers, got {described(value)}.")
    index = index.astype(jnp.int32)
    return index if index.ndim else index[None]


def check_change(change: At, site: Site) -> At:
    """`change` as it is at `site`, negative heads and features counted from the end.

    **Raises:** `ValueError` for an axis that the site does not have, or an index beyond it.
    """
    if site.streams is None and change.stream is not None:
        raise ValueError(f"{site.name} is a single stream: leave out stream={change.stream}.")
    if site.streams is not None and change.stream not in range(site.streams):
        raise ValueError(
            f"{site.name} has {site.streams} parallel streams: say which one to change with "
            f"at(..., stream=0) to stream={site.streams - 1}; got stream={change.stream}."
        )
    for axis, index in change.chosen().items():
        if axis not in site.axes:
            has = ", ".join(f"{one}s" for one in site.axes) or "no axes that have a name"
            raise ValueError(f"{site.name} has no {axis}s to choose from; it has {has}.")
        size = site.size(axis)
        if size is not None and not isinstance(index, Tracer):
            index = np.asarray(index)
            if ((index < -size) | (index >= size)).any():
                raise ValueError(f"{site.name} has {size} {axis}s; got {axis}s={index.tolist()}.")
            index = index % size
            change = eqx.tree_at(lambda at: getattr(at, f"{axis}s"), change, index)
    return change


def changed(change: At, x: Float[Array, "..."], site: Site, tokens: Tokens | None) -> Array:
    """`x` after the change.

    Rows of a text without a chosen position are NaN where positions are known under `jit` only.

    **Raises:** `ValueError` for values of the wrong shape, and for positions outside of the text.
    """
    if change.stream is not None:
        new = _changed(change, x[change.stream], site, tokens)
        streams = jnp.arange(len(x)).reshape(-1, *[1] * new.ndim)
        # Not `at[].set`: a scatter is a step of its own, around which rounding differs.
        return jnp.where(streams == change.stream, new[None], x)
    return _changed(change, x, site, tokens)


def _changed(change: At, x: Array, site: Site, tokens: Tokens | None) -> Array:
    choices = [_choice(axis, index, x, site, tokens) for axis, index in change.chosen().items()]
    if isinstance(change.change, _Function):
        new = _result(change.change, x, site)
    else:
        new = _spread(change.change, x, site, choices)
    new = new.astype(x.dtype)
    if not choices:
        return new
    mask, missing = choices[0].mask, choices[0].missing
    for choice in choices[1:]:
        mask, missing = mask & choice.mask, missing | choice.missing
    new = jnp.where(mask, new, x)
    return jnp.where(missing, jnp.asarray(jnp.nan, x.dtype), new)


class _Choice(NamedTuple):
    """The chosen places along one axis of a value.

    `size` is how many are chosen; all else has the axes of the value, of length 1 where they do not
    matter.
    """

    axis: int
    size: int
    mask: Bool[Array, "..."]
    number: Int[Array, "..."]  # of each place among the chosen ones
    missing: Bool[Array, "..."]


def _choice(
    axis: Axis, chosen: Int[Array, "*B n"], x: Array, site: Site, tokens: Tokens | None
) -> _Choice:
    number = site.axes.index(axis) - len(site.axes)
    if axis in ("position", "key"):
        places = _positions(axis, chosen, site, tokens)
    else:
        places = jnp.arange(x.shape[number], dtype=jnp.int32)
    batch = x.ndim - len(site.axes)
    same = _ranked(places, batch + 1)[..., :, None] == _ranked(chosen, batch + 1)[..., None, :]

    def placed(found: Array) -> Array:
        """With the axes of the value: `found` has those of the batch, then this one."""
        others = [1] * len(site.axes)
        others[number] = found.shape[-1]
        return found.reshape(*found.shape[:-1], *others)

    missing = ~same.any(axis=-2)
    if axis in ("position", "key") and not (tokens and tokens.complete):
        # It may come in a later call, or have been in an earlier one.
        missing = jnp.zeros_like(missing)
    elif axis in ("position", "key") and not isinstance(missing, Tracer) and missing.any():
        raise _outside(axis, chosen, site, f"the positions {np.asarray(places).tolist()}")
    return _Choice(
        axis=number,
        size=chosen.shape[-1],
        mask=placed(same.any(axis=-1)),
        number=placed(jnp.argmax(same, axis=-1)),
        missing=placed(missing.any(axis=-1, keepdims=True)),
    )


def _ranked(x: Array, rank: int) -> Array:
    """`x` with axes of length 1 in front."""
    return x.reshape(*[1] * (rank - x.ndim), *x.shape)


def _positions(axis: Axis, chosen: Array, site: Site, tokens: Tokens | None) -> Array:
    if tokens is None:
        raise ValueError(
            f"{site.name} is reached by a call that does not say which tokens it is of, so no "
            "positions can be chosen: call the model, or leave out `positions`."
        )
    length = tokens.length
    if length is not None and not isinstance(chosen, Tracer) and (chosen >= length).any():
        raise _outside(axis, chosen, site, f"{length} tokens, 0 to {length - 1}")
    if axis == "position":
        return tokens.positions
    assert tokens.keys is not None
    return tokens.keys


def _outside(axis: Axis, chosen: Array, site: Site, text: str) -> ValueError:
    return ValueError(
        f"{site.name}: {axis}s={np.asarray(chosen).tolist()} lie outside of the text, which has "
        f"{text}."
    )


def _result(function: Callable[[Array], Any], x: Array, site: Site) -> Array:
    new = jnp.asarray(function(x))
    if new.shape != x.shape:
        raise ValueError(
            f"{site.name}: the change must return the shape it is given, {x.shape}; got "
            f"{new.shape}."
        )
    return new


def _spread(value: Array, x: Array, site: Site, choices: list[_Choice]) -> Array:
    """The new value of every place, from one for each chosen place."""
    shape = list(x.shape)
    for choice in choices:
        shape[choice.axis] = choice.size
    _check_shape(value, tuple(shape), site)
    value = jnp.broadcast_to(value, tuple(shape))
    for choice in choices:
        if choice.size > 1:
            value = jnp.take_along_axis(value, choice.number, axis=choice.axis)
        else:
            shape = [*value.shape]
            shape[choice.axis] = x.shape[choice.axis]
            value = jnp.broadcast_to(value, shape)
    return value


def _check_shape(value: Array, shape: tuple[int, ...], site: Site) -> None:
    """Refuses values that do not broadcast to `shape`."""
    if value.ndim > len(shape):
        raise ValueError(
            f"{site.name}: the new value has {value.ndim} axes, {value.shape}, and there are "
            f"{len(shape)}, {shape}."
        )
    names = ["batch"] * (len(shape) - len(site.axes)) + list(site.axes)
    for number in range(-value.ndim, 0):
        if value.shape[number] not in (1, shape[number]):
            name = names[number]
            hint = " Choose `positions` for it." if name == "position" else ""
            raise ValueError(
                f"{site.name}: the axis of {name}s of the new value has {value.shape[number]} "
                f"entries, and {shape[number]} are to be replaced.{hint}"
            )
