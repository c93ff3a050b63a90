"""Transforms of logits that look at every token alike: temperature, penalties, biases; and chains.

A transform maps logits `[*B V]` to logits, given the tokens seen so far, `[*B T]` with −1 in empty
places. Those made here are modules: their numbers are array leaves, so that another value needs no
new compilation. What cuts the vocabulary down is in `_truncation.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import as_id_tuple, as_integer, as_number, bucketed, described
from equigemma._typing import Array, Float, Int, typed


Transform = Callable[[Float[Array, "*B V"], Int[Array, "*B T"]], Float[Array, "*B V"]]

_T = TypeVar("_T", bound=Transform | None)


class Function(eqx.Module):
    """A plain function as a transform. Programs are kept by its identity: define it once."""

    function: Callable = eqx.field(static=True)

    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        return self.function(logits, tokens)


def as_module(transform: _T) -> _T:
    """A transform that can be passed into `jit`: what is no pytree becomes a `Function`."""
    if transform is None or not jax.tree_util.all_leaves([transform]):
        return transform
    if not callable(transform):
        raise TypeError(
            "A transform must be a function of logits and tokens, as `sampling.top_k(64)` gives "
            f"one; got {described(transform)}."
        )
    return cast(_T, Function(transform))


class Chain(eqx.Module):
    """Transforms one after the other, in the order given."""

    transforms: tuple[Transform, ...]

    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        for transform in self.transforms:
            logits = transform(logits, tokens)
        return logits


def chain(*transforms: Transform) -> Chain:
    """One transform that applies all of these in the order given; plain functions are welcome.

    ```python
    >>> import jax.numpy as jnp
    >>> from equigemma import sampling
    >>> rule = sampling.chain(sampling.forbid([2]), sampling.temperature(0.5), sampling.top_k(2))
    >>> rule(jnp.array([1.0, 3.0, 4.0, 2.0]), jnp.array([-1])).tolist()
    [-inf, 6.0, -inf, 4.0]

    ```

    **Arguments:** `*transforms`: functions `(logits, tokens) -> logits`, in the order in which they
    apply.

    **Returns:** a transform, which is an Equinox module.
    """
    return Chain(tuple(as_module(transform) for transform in transforms))


class Temperature(eqx.Module):
    """Divides logits by `value`: below 1 sharper, above 1 flatter.

    **Raises:** `ValueError` unless `value > 0`; temperature 0 is `Greedy()`.
    """

    value: Float[Array, ""]

    def __init__(self, value: float):
        value = as_number("temperature", value)
        if not value > 0:
            raise ValueError(f"A temperature must be above 0, got {value}; for 0 use Greedy().")
        self.value = jnp.asarray(value, jnp.float32)

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        del tokens
        return logits / self.value.astype(logits.dtype)


temperature = Temperature


class RepetitionPenalty(eqx.Module):
    """Makes tokens of the prompt and of the text so far less likely: above 1 less, below 1 more.

    Their logits are divided by `factor` if positive, else multiplied with it.

    **Raises:** `ValueError` unless `factor > 0`.

    **Source:** Keskar et al. 2019, arXiv:1909.05858, with the case of negative logits that all
    implementations add; prompt and "beginning of sequence" count, as in transformers.
    """

    factor: Float[Array, ""]

    def __init__(self, factor: float):
        factor = as_number("repetition_penalty", factor)
        if not factor > 0:
            raise ValueError(
                f"A repetition penalty must be above 0, got {factor}; 1 changes nothing."
            )
        self.factor = jnp.asarray(factor, jnp.float32)

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        factor = self.factor.astype(logits.dtype)
        old = jnp.take_along_axis(logits, jnp.maximum(tokens, 0), axis=-1)
        return _scatter_logits(logits, tokens, jnp.where(old < 0, old * factor, old / factor))


repetition_penalty = RepetitionPenalty


class PresencePenalty(eqx.Module):
    """Takes `amount` from the logits of all tokens in prompt and text so far, however often seen.

    Below 0 it is added.

    **Raises:** `ValueError` unless `amount` is finite.
    """

    amount: Float[Array, ""]

    def __init__(self, amount: float):
        self.amount = _finite("presence penalty", amount)

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        old = jnp.take_along_axis(logits, jnp.maximum(tokens, 0), axis=-1)
        return _scatter_logits(logits, tokens, old - self.amount.astype(logits.dtype))


presence_penalty = PresencePenalty


class FrequencyPenalty(eqx.Module):
    """Takes `amount` from a logit for each time its token is in prompt and text so far.

    **Raises:** `ValueError` unless `amount` is finite.
    """

    amount: Float[Array, ""]

    def __init__(self, amount: float):
        self.amount = _finite("frequency penalty", amount)

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        # Counted first: one product has one rounding, however often a token was seen.
        count = _each_row(lambda zeros, ids: zeros.at[ids].add(1, mode="drop"), tokens.ndim - 1)
        seen = count(jnp.zeros_like(logits), _drop_padding(tokens, logits))
        return logits - self.amount.astype(logits.dtype) * seen


frequency_penalty = FrequencyPenalty


class LogitBias(eqx.Module):
    """Adds to the logits of some tokens, by id; −inf forbids a token.

    `generate` refuses ids beyond the vocabulary; the transform alone passes over them.

    **Raises:** `ValueError` for a negative id, or a value that is NaN or +inf.
    """

    ids: Int[Array, " some"]  # -1: none
    values: Float[Array, " some"]

    def __init__(self, values: Mapping[int, float]):
        biases = _checked_biases(values)
        # A power of two: programs are made for sizes, and one for each number of ids would be many.
        padding = (0, bucketed(len(biases), 8) - len(biases))
        ids = np.pad(np.asarray(list(biases), np.int32), padding, constant_values=-1)
        numbers = np.pad(np.asarray(list(biases.values()), np.float32), padding)
        self.ids, self.values = jnp.asarray(ids), jnp.asarray(numbers)

    @typed
    def __call__(
        self, logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"]
    ) -> Float[Array, "*B V"]:
        del tokens
        ids = _drop_padding(self.ids, logits)
        return logits.at[..., ids].add(self.values.astype(logits.dtype), mode="drop")


logit_bias = LogitBias


def forbid(ids: Sequence[int]) -> LogitBias:
    """Keeps these tokens from being chosen.

    **Arguments:** `ids`: of the tokens.

    **Returns:** a transform that makes their logits −inf.

    **Raises:** `ValueError` for a negative id.
    """
    return LogitBias(dict.fromkeys(as_id_tuple("forbid", ids), float("-inf")))


def _checked_biases(values: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise TypeError(
            f"`logit_bias` must be a mapping of ids to numbers, such as {{5: -1.0}}, got "
            f"{described(values)}."
        )
    biases = {
        as_integer("logit_bias", index): as_number("logit_bias", value)
        for index, value in values.items()
    }
    for index, value in biases.items():
        if index < 0 or not value < float("inf"):
            raise ValueError(
                f"A bias needs an id of 0 or more and a number below infinity, "
                f"got {value} for the id {index}."
            )
    return biases


def _finite(name: str, amount: float) -> Float[Array, ""]:
    amount = as_number(name.replace(" ", "_"), amount)
    if not np.isfinite(amount):
        raise ValueError(f"A {name} must be a finite number, got {amount}.")
    return jnp.asarray(amount, jnp.float32)


def _drop_padding(ids: Int[Array, "..."], logits: Float[Array, "*B V"]) -> Int[Array, "..."]:
    """Empty places moved past the vocabulary, where writes are dropped: −1 would be the last id."""
    return jnp.where(ids < 0, logits.shape[-1], ids)


def _scatter_logits(
    logits: Float[Array, "*B V"], tokens: Int[Array, "*B T"], values: Float[Array, "*B T"]
) -> Float[Array, "*B V"]:
    """Logits with those of `tokens` replaced; equal tokens have equal values."""
    put = _each_row(lambda row, ids, new: row.at[ids].set(new, mode="drop"), tokens.ndim - 1)
    return put(logits, _drop_padding(tokens, logits), values)


def _each_row(function: Callable, axes: int) -> Callable:
    for _ in range(axes):
        function = jax.vmap(function)
    return function
