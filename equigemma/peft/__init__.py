"""Adapters in the files of PEFT, the library of adapters for `transformers`, both ways.

A folder with `adapter_config.json` and `adapter_model.safetensors`. What an adapter computes is in
`equigemma.lora`; whole models are written by `equigemma.save`.

**Source:** PEFT's documentation, "PEFT checkpoint format"; `peft/tuners/lora/config.py`.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from equigemma._typing import typed
from equigemma.checkpoint import CheckpointError
from equigemma.checkpoint._errors import about
from equigemma.checkpoint._files import new_folder
from equigemma.checkpoint._hf_rules import names_of, rules
from equigemma.checkpoint._json import read_json, write_json
from equigemma.checkpoint._keymap import leaf_shapes, plan
from equigemma.checkpoint._linen import skeleton
from equigemma.config import ModelConfig
from equigemma.lora import Adapter, DoRAEinsum, LoRAEinsum, adapters, einsums
from equigemma.lora._adapters import dense, factor_axes, lengths, sizes
from equigemma.lora._tree import put
from equigemma.nn import AbstractEinsum, Transformer


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_ROOT, _DOWN, _UP, _MAGNITUDE = (
    "base_model.model.",
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_magnitude_vector",
)
# In front of the layers of a text model: with a tower for images since transformers 4.52 and
# before it, with a head, and alone.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
# What of a config would change the result in ways that are not here; each with what it must be.
_NOT_HERE = {
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
}


@typed
def save(model: Transformer, path: str | os.PathLike[str], *, base: str | None = None) -> None:
    """Writes the adapters of a model, in float32, to a folder that `peft` loads.

    ```python
    >>> from equigemma import peft
    >>> peft.save(model, "adapter", base="google/gemma-3-270m")  # doctest: +SKIP

    ```

    The folder appears whole or not at all; one that is there must hold an adapter, it is replaced.

    **Arguments:** `base`: the name of the model that the adapters are for, which goes into the file
    for readers.

    **Raises:** `CheckpointError` if there are no adapters, or some that PEFT has no names for;
    `ImportError` if `safetensors` is not installed.
    """
    target = Path(path).expanduser()
    found = adapters(model)
    modules = _modules(model.config)
    if problems := list(_problems(found, modules)):
        raise CheckpointError(f"{target} cannot be saved:\n  " + "\n  ".join(problems[:10]))
    parts = {
        f"model.{module}": part
        for name, adapter in found.items()
        for module, part in zip(modules[name], _parts(adapter), strict=True)
    }
    tensors = {
        f"{_ROOT}{module}{suffix}": np.ascontiguousarray(array, np.float32)
        for module, part in parts.items()
        for suffix, array in part.tensors()
    }
    everything = [f"model.{module}" for names in modules.values() for module in names]
    with new_folder(target, lambda entry: entry.name in (CONFIG, WEIGHTS)) as folder:
        write_json(folder / CONFIG, _config(parts, everything, base))
        _safetensors().numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@typed
def load(path: str | os.PathLike[str], model: Transformer) -> Transformer:
    """`model` with the adapters of a folder, in float32, around its projections.

    ```python
    >>> import equigemma as eg
    >>> from equigemma import peft
    >>> model, tokenizer = eg.load("google/gemma-3-270m")  # doctest: +SKIP
    >>> model = peft.load("adapter", model)  # doctest: +SKIP

    ```

    **Arguments:** `model`: as `equigemma.load` gives it; quantise or prepare it afterwards.

    **Raises:** `CheckpointError` if the folder is damaged, is for another model, or holds what is
    not supported here; `ImportError` if `safetensors` is not installed.
    """
    folder = Path(path).expanduser()
    with about(folder):
        config = read_json(folder / CONFIG)
        _check(config)
        tensors = _read(folder / WEIGHTS)
        found: dict[str, Adapter] = {}
        inside = dict(einsums(model))
        for name, modules in _modules(model.config).items():
            if any(f"{module}{_DOWN}" in tensors for module in modules):
                if name not in inside:
                    raise CheckpointError(
                        f"the model has no projection {name}; load adapters before `prepare`."
                    )
                found[name] = _adapter(inside[name], modules, config, tensors)
        if tensors:
            raise CheckpointError(
                f"it holds what this model has no place for: {', '.join(sorted(tensors)[:5])}."
            )
        if not found:
            raise CheckpointError("it holds no adapters.")
        return put(found, model)


class _Part(NamedTuple):
    """What PEFT stores for one of its modules."""

    down: np.ndarray  # A, [r, inputs]
    up: np.ndarray  # B, [outputs, r]
    magnitude: np.ndarray | None  # [outputs]
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """What PEFT divides by the rank."""
        alpha = self.scale * self.rank
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        yield _DOWN, self.down
        yield _UP, self.up
        if self.magnitude is not None:
            yield _MAGNITUDE, self.magnitude


def _modules(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """For each projection of a layer the modules that `transformers` has in its place."""
    return {
        entry.path.removesuffix(".weight"): tuple(key.removesuffix(".weight") for key in entry.keys)
        for entry in plan(leaf_shapes(skeleton(config)), rules(config, names_of("")))
        if entry.path.startswith("layers.")
        and all(key.endswith(".weight") for key in entry.keys)
        and len(entry.key_shape) == 2
    }


def _problems(found: Mapping[str, Adapter], modules: Mapping[str, Any]) -> Iterator[str]:
    if not found:
        yield "the model has no adapters; `lora.add` makes some."
    if len({type(adapter) for adapter in found.values()}) > 1:
        yield "adapters are of two kinds, LoRA and DoRA; a file has one."
    for name, adapter in found.items():
        if name not in modules:
            yield f"{name}: PEFT adapts linear maps of single weights, this is none."
        if isinstance(adapter.base, Adapter):
            yield f"{name}: one adapter is around another; merge the inner one."


def _parts(adapter: Adapter) -> Iterator[_Part]:
    down_axes, _ = factor_axes(adapter.eqn)
    magnitude = adapter.magnitude if isinstance(adapter, DoRAEinsum) else None
    rank = adapter.down.shape[-1]
    arrays = [np.asarray(array, np.float32) for array in (adapter.down, adapter.up)]
    if "C" not in down_axes:
        arrays = [array[None] for array in arrays]
    count = len(arrays[0])
    lengths = [None] * count
    if magnitude is not None:
        lengths = list(np.asarray(magnitude, np.float32).reshape(count, -1))
    for down, up, length in zip(*arrays, lengths, strict=True):
        yield _Part(down.reshape(-1, rank).T, up.reshape(rank, -1).T, length, adapter.scale)


def _config(parts: Mapping[str, _Part], modules: list[str], base: str | None) -> dict[str, Any]:
    usual = next(iter(parts.values()))
    last = {module.rpartition(".")[2] for module in parts}
    # Short names, as people write them, if they mean the same.
    short = {module for module in modules if module.rpartition(".")[2] in last} == parts.keys()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual.rank,
        "lora_alpha": usual.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": usual.magnitude is not None,
        "target_modules": sorted(last if short else parts),
        "rank_pattern": {m: part.rank for m, part in parts.items() if part.rank != usual.rank},
        "alpha_pattern": {m: part.alpha for m, part in parts.items() if part.alpha != usual.alpha},
        "modules_to_save": None,
    }


def _check(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"its peft_type is {kind!r:.40}; only LORA is read.")
    for key, harmless in _NOT_HERE.items():
        if key in config and config[key] not in harmless:
            raise CheckpointError(
                f"its {key} is {config[key]!r:.80}; only {harmless[0]!r} is supported."
            )


def _read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor, by its module and kind."""
    library = _safetensors()
    tensors: dict[str, np.ndarray] = {}
    try:
        with library.safe_open(path, "numpy") as file:
            for key in file.keys():
                array = np.asarray(file.get_tensor(key)).astype(np.float32)
                if _short(key) in tensors:
                    raise CheckpointError(f"it holds {_short(key)} twice.")
                tensors[_short(key)] = array
    except library.SafetensorError as error:
        raise CheckpointError(f"{path.name} is cut off or damaged: {error}.") from error
    return tensors


def _short(key: str) -> str:
    name = key.removeprefix(_ROOT)
    prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
    return name.removeprefix(prefix)


def _adapter(
    einsum: AbstractEinsum,
    modules: tuple[str, ...],
    config: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
) -> Adapter:
    """The adapter of one projection; its tensors are taken out."""
    axes = sizes(einsum)
    down_axes, up_axes = factor_axes(einsum.eqn)
    inputs, outputs = (
        math.prod(axes[axis] for axis in letters if axis not in "Cr")
        for letters in (down_axes, up_axes)
    )
    is_dora = bool(config.get("use_dora"))
    stored = [
        _stored(module, (inputs, outputs), config, tensors, is_dora)
        if f"{module}{_DOWN}" in tensors
        else None
        for module in modules
    ]
    present = [part for part in stored if part is not None]
    rank, scale = max(part.rank for part in present), present[0].scale

    down = np.zeros((len(modules), inputs, rank), np.float32)
    up = np.zeros((len(modules), rank, outputs), np.float32)
    for index, part in enumerate(stored):
        if part is not None:
            down[index, :, : part.rank] = part.down.T
            # One strength for all parts; what a part's own is larger by goes into its numbers.
            up[index, : part.rank] = part.up.T * np.float32(part.scale / scale)
    shapes = ([axes.get(axis, rank) for axis in letters] for letters in (down_axes, up_axes))
    factors = [jnp.asarray(array.reshape(s)) for array, s in zip((down, up), shapes, strict=True)]
    shared = {"base": einsum, "down": factors[0], "up": factors[1], "eqn": einsum.eqn}
    if not is_dora:
        return LoRAEinsum(**shared, scale=scale)
    magnitude = np.array(lengths(einsum.eqn, dense(einsum, axes)), np.float32)
    flat = magnitude.reshape(len(modules), -1)
    for index, part in enumerate(stored):
        if part is not None:
            flat[index] = part.magnitude
    return DoRAEinsum(**shared, scale=scale, magnitude=jnp.asarray(magnitude))


def _stored(
    module: str,
    size: tuple[int, int],
    config: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    is_dora: bool,
) -> _Part:
    inputs, outputs = size
    suffixes = (_DOWN, _UP, _MAGNITUDE) if is_dora else (_DOWN, _UP)
    if missing := [suffix for suffix in suffixes if f"{module}{suffix}" not in tensors]:
        raise CheckpointError(f"{module}{missing[0]} is missing.")
    down, up, *rest = (tensors.pop(f"{module}{suffix}") for suffix in suffixes)
    rank = down.shape[0] if down.ndim else 0
    expected = {_DOWN: (rank, inputs), _UP: (outputs, rank), _MAGNITUDE: (outputs,)}
    for suffix, array in zip(suffixes, (down, up, *rest), strict=True):
        if array.shape != expected[suffix] or not rank:
            raise CheckpointError(
                f"{module}{suffix}: expected shape {list(expected[suffix])}, got "
                f"{list(array.shape)}; the adapter is of another model."
            )
    alpha = _number(_pattern(config, "alpha_pattern", module), config.get("lora_alpha"))
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return _Part(down, up, rest[0] if rest else None, alpha / divisor)


def _number(*values: Any) -> float:
    value = next((value for value in values if value is not None), None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"its lora_alpha is {value!r:.40}; a number was expected.")
    return float(value)


def _pattern(config: Mapping[str, Any], name: str, module: str) -> Any:
    """What a config says of modules whose names end so.

    PEFT takes the names for regular expressions. Nobody vouches for a file's, so they are not run.
    """
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"its {name} is no object.")
    for key, value in patterns.items():
        if not re.fullmatch(r"\^?[\w.]+", key):
            raise CheckpointError(f"its {name} has the pattern {key!r:.60}; only names are read.")
        plain = _short(key.removeprefix("^"))
        if module == plain or module.endswith(f".{plain}"):
            return value
    return None


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Adapters in files need the package safetensors, which is not installed: "
            'pip install "equigemma[hf]".'
        ) from error
    return safetensors
