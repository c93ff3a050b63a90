"""The values under an architecture's own name in a GGUF file, each taken once or refused by name.

**Source:** llama.cpp `src/llama-model.cpp` (`load_hparams`); `docs/gguf.md` of ggml for the names.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._fields import Fields, short


# Limits that a model was trained for, and notes on how it was made: nothing to compute with.
_WITHOUT_EFFECT = frozenset(
    ("context_length", "rope.scaling.original_context_length", "rope.scaling.finetuned")
)
# Options of which one value is supported.
_FIXED = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}


class Limits(NamedTuple):
    """What a file holds, so that a made-up size is refused before anything is built from it."""

    tensors: int
    largest: int

    def check(self, layers: int, sizes: Iterable[int]) -> None:
        """**Arguments:** `sizes`: of weights that there must be, in numbers."""
        if layers > self.tensors:
            raise CheckpointError(
                f"its metadata claim {layers} layers, and it has {self.tensors} tensors."
            )
        if (claimed := max(sizes)) > self.largest:
            raise CheckpointError(
                f"its metadata describe a weight of {claimed} numbers, and its largest tensor has "
                f"{self.largest}."
            )


class Options:
    """The values under one architecture's name, and which of them have not been read yet."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        prefix = f"{architecture}."
        self._prefix = prefix
        self._fields = Fields(
            {
                key.removeprefix(prefix): value
                for key, value in metadata.items()
                if key.startswith(prefix)
            },
            name=prefix,
        )

    def number(self, key: str, default: float | None = None) -> float:
        self._check_told(key, default)
        return self._fields.number(key, default)

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        self._check_told(key, default)
        return self._fields.size(key, default, least=least)

    def sizes(self, key: str, count: int, default: int | None = None) -> list[int]:
        """One size for each of `count` layers; a file may say it once for all."""
        self._check_told(key, default)
        value = self._fields.take(key, default)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count or not all(type(size) is int and size > 0 for size in values):
            raise CheckpointError(
                f"its {self._prefix}{key} must be a whole number from 1 up, or such a number "
                f"for each of {count} layers; got {short(value)}."
            )
        return values

    def _check_told(self, key: str, default: Any) -> None:
        if default is None and key not in self._fields:
            raise CheckpointError(f"its metadata lack {self._prefix}{key}.")

    def optional(self, key: str, default: Any) -> Any:
        return self._fields.take(key, default)

    def expect(self, key: str, only: Any) -> None:
        """Refuses any value but one."""
        self._fields.expect(key, only)

    def refuse_rest(self) -> None:
        for key, only in _FIXED.items():
            self.expect(key, only)
        self._fields.refuse_rest(_WITHOUT_EFFECT)


def read_rope_scale(options: Options) -> float:
    kind = options.optional("rope.scaling.type", "linear")
    old_name = options.number("rope.scale_linear", 0.0)
    factor = options.number("rope.scaling.factor", old_name) or 1.0
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"its rope.scaling.type is {kind!r}; only 'none' and 'linear' are supported."
        )
    return factor if kind == "linear" else 1.0


def read_locals(options: Options, layers: int, *, period: int) -> list[bool]:
    """Which layers have a window: all but the last of every `period`, or those the file lists."""
    listed = options.optional("attention.sliding_window_pattern", period)
    if isinstance(listed, int):
        return [not listed or index % listed < listed - 1 for index in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers:
        raise CheckpointError(
            "its attention.sliding_window_pattern must be a number, or a list with an entry for "
            f"each of {layers} layers; got {listed!r}."
        )
    return [bool(here) for here in listed]
