"""Checks of numbers from the command line, named as they were typed. They need no model."""

import math


SEEDS = 1 << 32


def at_least(name: str, value: float, least: float) -> None:
    """**Raises:** `ValueError` unless `value` is a finite number of at least `least`."""
    _finite(name, value)
    if value < least:
        raise ValueError(f"{option(name)} must be at least {least}, got {value}.")


def above_zero(name: str, value: float) -> None:
    """**Raises:** `ValueError` unless `value` is a finite number above 0."""
    _finite(name, value)
    if value <= 0:
        raise ValueError(f"{option(name)} must be above 0, got {value}.")


def probability(name: str, value: float) -> None:
    """**Raises:** `ValueError` unless `value` is in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{option(name)} must be above 0 and at most 1, got {value}.")


def fraction(name: str, value: float) -> None:
    """**Raises:** `ValueError` unless `value` is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{option(name)} must be in [0, 1), got {value}.")


def seed(value: int) -> None:
    """**Raises:** `ValueError` unless `value` is a seed of every generator in use."""
    if not 0 <= value < SEEDS:
        raise ValueError(f"--seed must be from 0 to {SEEDS - 1}, got {value}.")


def text(name: str, value: str) -> None:
    """**Raises:** `ValueError` for bytes that are no text, as the shell hands them on."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be text in UTF-8; character {error.start} is not.") from None


def _finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{option(name)} must be a finite number, got {value}.")


def option(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"
