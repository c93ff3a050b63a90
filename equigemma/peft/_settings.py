"""`adapter_config.json`, read so that no key that changes numbers goes unnoticed.

**Source:** peft 0.21 `tuners/lora/config.py`; `tuners/lora/layer.py::update_layer` for what an
initialisation does to the base when a saved adapter is loaded again; `utils/other.py` and
`tuners/tuners_utils.py` for which modules are meant.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equigemma.checkpoint import CheckpointError
from equigemma.peft._pattern import PatternError, matches, matches_whole


# Notes, options of training, and those of initialisations, which are read where one is named.
_WITHOUT_EFFECT = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out inference_mode
    layers_pattern loftq_config lora_dropout lora_ga_config megatron_config megatron_core
    merge_weights peft_type peft_version qalora_group_size revision runtime_config task_type
    velora_config
    """.split()
)
_READ = frozenset(
    """
    alpha_pattern bias ensure_weight_tying exclude_modules init_lora_weights layers_to_transform
    lora_alpha modules_to_save r rank_pattern target_modules target_parameters
    trainable_token_indices use_dora use_rslora
    """.split()
)
# After these the base is as it was, and what the file holds is all that there is.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# These take from the base what they begin with, each time that an adapter is loaded.
_STARTS_FROM_BASE = ("pissa", "olora")
_NAME = re.compile(r"\w+")


@dataclass(frozen=True)
class Settings:
    """The options of an adapter that change what it computes."""

    rank: int
    alpha: float
    divides_by_root: bool
    """The update counts α / √r, not α / r."""
    is_dora: bool
    start: str | bool
    """How adapters began."""
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layer_lists: tuple[str, ...]
    saved: tuple[str, ...]
    """Modules that the file holds whole."""
    parameters: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    """Rows of embeddings that were learned, by the names of the modules."""
    ties: bool
    """What is of the embedding holds for a tied head too."""

    @property
    def takes_from_base(self) -> bool:
        """Whether what an adapter began with is taken off the base."""
        return self.start in _STARTS_FROM_BASE

    def rank_of(self, name: str) -> int:
        """The rank of the adapter of a module."""
        return _whole(_of_pattern(self.ranks, "rank_pattern", name, self.rank), "rank_pattern")

    def scale_of(self, name: str, rank: int) -> float:
        """What the update of a module counts."""
        alpha = _of_pattern(self.alphas, "alpha_pattern", name, None)
        alpha = self.alpha if alpha is None else _number(alpha, "alpha_pattern")
        return alpha / (math.sqrt(rank) if self.divides_by_root else rank)

    def is_target(self, name: str, *, is_linear: bool = True) -> bool:
        """Whether PEFT puts an adapter around the module of this name."""
        with _named("exclude_modules"):
            if _is_among(name, self.excluded):
                return False
        with _named("modules_to_save"):
            if any(matches(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.saved):
                return False
        if isinstance(self.targets, str):
            if self.targets.lower() == "all-linear":
                return is_linear and name != "lm_head"
            with _named("target_modules"):
                return matches_whole(self.targets, name)
        return _is_among(name, self.targets) and self._is_in_layers(name)

    def _is_in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        # The first number that stands behind a list of layers, of any name if none is told.
        lists = [rf"(?:.*?\.)?{name}" for name in self.layer_lists] or [r".*?\.[^.]*"]
        found = (re.match(rf"{name}\.(\d+)\.", module) for name in lists)
        first = next((match for match in found if match is not None), None)
        return first is not None and int(first[1]) in self.layers


def read_settings(config: Mapping[str, Any]) -> Settings:
    """The settings of a config.

    **Raises:** `CheckpointError` for an option that is not supported.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"its peft_type is {kind!r:.40}; only LORA is read.")
    for key, value in sorted(config.items()):
        if key not in _READ | _WITHOUT_EFFECT and value not in (None, False, [], {}, "", "none"):
            raise CheckpointError(f"its {key} is {value!r:.80}, which is not supported here.")
    if config.get("bias", "none") not in ("none", "all", "lora_only", None):
        raise CheckpointError(f"its bias is {config['bias']!r:.80}, which is not supported here.")
    targets, parameters = config.get("target_modules"), _names(config, "target_parameters")
    if targets is None and not parameters:
        raise CheckpointError("it has no target_modules; name those that the adapters are for.")
    return Settings(
        rank=_whole(config.get("r", 8), "r"),
        alpha=_number(config.get("lora_alpha", 8), "lora_alpha"),
        divides_by_root=bool(config.get("use_rslora")),
        is_dora=bool(config.get("use_dora")),
        start=_start(config),
        ranks=_patterns(config, "rank_pattern"),
        alphas=_patterns(config, "alpha_pattern"),
        targets=_names_or_pattern(config, "target_modules"),
        excluded=_names_or_pattern(config, "exclude_modules"),
        layers=_layers(config),
        layer_lists=_layer_lists(config),
        saved=_names(config, "modules_to_save"),
        parameters=parameters,
        tokens=_tokens(config),
        ties=bool(config.get("ensure_weight_tying")),
    )


def _start(config: Mapping[str, Any]) -> str | bool:
    start = config.get("init_lora_weights", True)
    if start is None or isinstance(start, bool):
        return bool(start)
    if isinstance(start, str) and start.lower() in (*_PLAIN_STARTS, *_STARTS_FROM_BASE):
        return start.lower()
    reasons = {
        "pissa_niter": "which takes a random approximation off the base, another one each time",
        "corda": "which PEFT itself does not load again: it wants the data that it was made with",
        "loftq": "which rounds the base",
    }
    known = (reason for name, reason in reasons.items() if str(start).lower().startswith(name))
    raise CheckpointError(
        f"its init_lora_weights is {start!r:.60}, {next(known, 'which is not known here')}. Save "
        "it with path_initial_model_for_weight_conversion, which makes plain adapters of it."
    )


def _tokens(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    told = config.get("trainable_token_indices") or {}
    told = {"embed_tokens": told} if isinstance(told, list) else told
    if not isinstance(told, dict):
        raise CheckpointError("its trainable_token_indices are neither a list nor an object.")
    for name, ids in told.items():
        is_list = isinstance(ids, list) and all(type(each) is int and each >= 0 for each in ids)
        if not is_list or len(set(ids)) != len(ids):
            raise CheckpointError(
                f"its trainable_token_indices of {name!r:.40} must be ids, each of them once."
            )
    return {name.rpartition(".")[2]: tuple(ids) for name, ids in told.items()}


def _layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    layers = config.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if not layers:
        return None
    if not isinstance(layers, list) or not all(type(index) is int for index in layers):
        raise CheckpointError("its layers_to_transform must be whole numbers.")
    return tuple(layers)


def _layer_lists(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("layers_pattern") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(
        isinstance(name, str) and _NAME.fullmatch(name) for name in names
    ):
        raise CheckpointError("its layers_pattern must be names, such as 'layers'.")
    return tuple(names)


def _names(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"its {key} must be a list of names, got {names!r:.60}.")
    return tuple(names)


def _names_or_pattern(config: Mapping[str, Any], key: str) -> str | tuple[str, ...]:
    value = config.get(key)
    return value if isinstance(value, str) and value else _names(config, key)


def _patterns(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"its {key} is no object.")
    return patterns


def _of_pattern(patterns: Mapping[str, Any], key: str, name: str, otherwise: Any) -> Any:
    """What the first pattern that fits says of a module.

    A pattern is a regular expression for the end of a name, behind a dot or from the beginning on.
    """
    with _named(key):
        for pattern, value in patterns.items():
            if matches(rf"(.*\.)?({pattern})$", name):
                return value
    return otherwise


def _is_among(name: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return matches_whole(names, name)
    return any(name == each or name.endswith(f".{each}") for each in names)


class _named:
    """Says in errors which key a pattern stood under."""

    def __init__(self, key: str):
        self.key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, PatternError):
            raise CheckpointError(f"its {self.key} is no pattern that is read: {error}.") from error


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"its {key} is {value!r:.40}; a number was expected.")
    return float(value)


def _whole(value: Any, key: str) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"its {key} is {value!r:.40}; a rank is a whole number from 1 up.")
    return value
