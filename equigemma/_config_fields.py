"""The fields of frozen configs, compared with their annotations when one is made."""

from collections.abc import Iterable
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from equigemma._arguments import as_integer, as_number, described, with_article


def check_fields(config: Any) -> None:
    """Refuses fields of another type than their annotation: numbers, choices and other configs.

    **Raises:** `TypeError` or `ValueError`.
    """
    kind = type(config).__name__
    for field in fields(config):
        _check(f"{kind}.{field.name}", getattr(config, field.name), field.type)


def _check(name: str, value: Any, annotation: Any) -> None:
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if value is None and NoneType in options:
        return
    choices = [choice for option in options for choice in _choices(option)]
    classes = tuple(option for option in options if _is_config(option))
    if choices and value not in choices:
        raise ValueError(f"`{name}` must be {_joined(map(repr, choices))}, got {described(value)}.")
    if classes and not isinstance(value, classes):
        wanted = _joined(with_article(option.__name__) for option in classes)
        raise TypeError(f"`{name}` must be {wanted}, got {described(value)}.")
    if int in options:
        as_integer(name, value)
    elif float in options:
        as_number(name, value)


def _choices(option: Any) -> tuple[Any, ...]:
    return get_args(option) if get_origin(option) is Literal else ()


def _is_config(option: Any) -> bool:
    return isinstance(option, type) and hasattr(option, "__dataclass_fields__")


def _joined(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def require_positive(config: object, *names: str) -> None:
    """Refuses numbers of these names that are 0 or below; None is none.

    **Raises:** `ValueError`.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{type(config).__name__}.{name} must be positive, got {value}.")


def require_divisor(kv_heads: int, heads: int) -> None:
    """Refuses query heads that cannot be shared out evenly.

    **Raises:** `ValueError`.
    """
    if heads % kv_heads:
        raise ValueError(
            f"The number of key/value heads must divide the number of query heads; got "
            f"{kv_heads} and {heads}. Gemma 3 4B uses 4 and 8."
        )
