"""The tiny models with sizes that a mesh of 8 devices divides."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from tests._support import tiny


SIZES = {
    "vocab": 32,
    "width": 16,
    "hidden_dim": 16,
    "hidden": 16,
    "dim": 8,
    "num_experts": 8,
    "num_soft_tokens": 4,
    "pixels": 12,
    "start": 29,
}


def divisible(config: Any) -> Any:
    """The same config with vocabulary, widths, hidden sizes, heads and experts that 4 divides; two
    key/value heads in place of three.
    """
    if not is_dataclass(config):
        return tuple(map(divisible, config)) if isinstance(config, tuple) else config
    changes = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "heads":
            changes["heads"] = {1: 1, 3: 4, 5: 4, 6: 8}[value]
        elif field.name in SIZES and isinstance(value, int):
            changes[field.name] = SIZES[field.name]
        elif is_dataclass(value) or isinstance(value, tuple):
            changes[field.name] = divisible(value)
    return replace(config, **changes)


CONFIGS = {name: divisible(config) for name, config in tiny.CONFIGS.items()}
SEEING = divisible(tiny.GEMMA3_SEEING)
