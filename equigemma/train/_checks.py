"""Arguments of training: one sentence for what is not what its name says."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from equigemma._arguments import as_integer, as_number, described
from equigemma.config import SigLIPConfig
from equigemma.nn import Transformer


def check_loss(loss: Any) -> None:
    """Refuses what cannot be called.

    **Raises:** `TypeError`.
    """
    if not callable(loss):
        raise TypeError(
            f"`loss` must be a function of a model and a batch, such as train.next_token_loss; got "
            f"{described(loss)}."
        )


def check_optimizer(optimizer: Any) -> None:
    """Refuses what is no optax transformation: it needs functions `init` and `update`.

    **Raises:** `TypeError`.
    """
    if callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None)):
        return
    name = getattr(optimizer, "__name__", "")
    got = (
        f"the function {name}, which makes one when it is called" if name else described(optimizer)
    )
    raise TypeError(
        f"`optimizer` must be a transformation of optax, such as optax.adamw(1e-4); got {got}."
    )


def check_model(model: Any) -> None:
    """Refuses what is not a model of this package.

    **Raises:** `TypeError`.
    """
    if not isinstance(model, Transformer):
        hint = ""
        if hasattr(model, "optimizer") and hasattr(model, "frozen"):
            hint = " That of a state is train.merge(state)."
        raise TypeError(f"`model` must be a Transformer, got {described(model)}.{hint}")


def check_fields(name: str, value: Any, wanted: str, fields: Iterable[str]) -> None:
    """Refuses what lacks the fields of a batch.

    **Raises:** `TypeError`.
    """
    if all(hasattr(value, field) for field in fields):
        return
    is_pair = isinstance(value, tuple) and len(value) == 2
    hint = " train.batches gives a batch and its DataState: take the first." if is_pair else ""
    raise TypeError(f"`{name}` must be a {wanted}, got {described(value)}.{hint}")


def check_loss_options(label_smoothing: Any, z_loss: Any, chunk: Any) -> tuple[float, float, int]:
    """The numbers of a cross-entropy.

    **Raises:** `TypeError` for what is no number; `ValueError` for those out of range.
    """
    return (
        in_range("label_smoothing", label_smoothing, 0, 1),
        in_range("z_loss", z_loss, 0),
        as_integer("chunk", chunk, least=1),
    )


def in_range(name: str, value: Any, least: float, most: float = jnp.inf) -> float:
    """A finite number of at least `least` and at most `most`.

    **Raises:** `TypeError` for what is no number; `ValueError` for those out of range.
    """
    number = as_number(name, value)
    if not (least <= number <= most and number < jnp.inf):
        bounds = f"at least {least}" if most == jnp.inf else f"from {least} to {most}"
        raise ValueError(f"`{name}` must be a finite number, {bounds}; got {number}.")
    return number


def check_vision(vision: Any) -> None:
    """Refuses what is not the config of a vision tower.

    **Raises:** `TypeError`.
    """
    if vision is not None and not isinstance(vision, SigLIPConfig):
        raise TypeError(
            f"`vision` must be the config of a vision tower, model.config.vision, or None; got "
            f"{described(vision)}."
        )


def check_function(name: str, value: Any, of: str) -> Callable[..., Any]:
    """Refuses what cannot be called.

    **Raises:** `TypeError`.
    """
    if not callable(value):
        raise TypeError(f"`{name}` must be a function of {of}, got {described(value)}.")
    return value
