"""The adapters of a model to a folder that PEFT loads."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equigemma._typing import typed
from equigemma.checkpoint import CheckpointError
from equigemma.checkpoint.core import leaves, new_folder, write_json
from equigemma.config import ModelConfig
from equigemma.lora import Adapter, DoRAEinsum, LoRAEmbedding, adapters, remove
from equigemma.lora._adapters import factor_axes
from equigemma.lora._tree import layers
from equigemma.nn import Transformer
from equigemma.peft._file import (
    CONFIG,
    DOWN,
    EMBEDDING_DOWN,
    EMBEDDING_UP,
    MAGNITUDE,
    UP,
    WEIGHTS,
    safetensors,
)
from equigemma.peft._names import EMBEDDING, HEAD, ROOT, every_linear, full, modules, places


_DOWN, _UP = f"{DOWN}.weight", f"{UP}.weight"


@typed
def save(
    model: Transformer,
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    modules_to_save: Sequence[str] = (),
) -> None:
    """Writes the adapters of a model, in float32, to a folder that `peft` loads.

    ```python
    >>> from equigemma import peft
    >>> peft.save(model, "adapter", base="google/gemma-3-270m")  # doctest: +SKIP

    ```

    The folder appears whole or not at all; one that is there must hold an adapter, it is replaced.

    **Arguments:**

    - `model`: one with adapters, as `lora.add` or `load` makes it.
    - `path`: of the folder.
    - `base`: the name of the model that the adapters are for, which goes into the file for readers.
    - `modules_to_save`: names of modules, as PEFT takes them, whose weights are written whole, such
      as `"lm_head"` of a model that was untied, or `"input_layernorm"`.

    **Raises:** `CheckpointError` if there are no adapters, or some that PEFT has no names for;
    `ImportError` if `safetensors` is not installed.
    """
    target = Path(path).expanduser()
    found, config = adapters(model), model.config
    names = modules(config)
    if problems := list(_problems(found, names)):
        raise CheckpointError(f"{target} cannot be saved:\n  " + "\n  ".join(problems[:10]))
    parts: dict[str, _Part] = {}
    for path_in_model, adapter in found.items():
        if isinstance(adapter, LoRAEmbedding):
            parts |= _embedding_parts(adapter)
        else:
            for name, part in zip(names[path_in_model], _parts(adapter), strict=True):
                parts[name] = part
    tensors = {
        f"{ROOT}{full(name, config)}{suffix}": array
        for name, part in parts.items()
        for suffix, array in part.tensors.items()
    }
    whole = dict(_whole(model, modules_to_save, target))
    tensors |= {f"{ROOT}{full(name, config)}": array for name, array in whole.items()}
    written = {
        name: np.ascontiguousarray(array, np.float32) for name, array in sorted(tensors.items())
    }
    ties = any(isinstance(each, LoRAEmbedding) and each.use == "both" for each in found.values())
    told = _config(parts, config, base) | {
        "ensure_weight_tying": ties,
        "modules_to_save": list(modules_to_save) or None,
    }
    with new_folder(target, lambda entry: entry.name in (CONFIG, WEIGHTS)) as folder:
        write_json(folder / CONFIG, told)
        safetensors().numpy.save_file(written, folder / WEIGHTS, metadata={"format": "pt"})


class _Part(NamedTuple):
    """What PEFT stores for one of its modules."""

    tensors: dict[str, np.ndarray]
    """By what stands behind the name of the module."""
    rank: int
    scale: float

    @property
    def alpha(self) -> float:
        """What PEFT divides by the rank."""
        alpha = self.scale * self.rank
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _problems(found: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[str]:
    if not found:
        yield "the model has no adapters; `lora.add` makes some."
    if len({type(each) for each in found.values() if not isinstance(each, LoRAEmbedding)}) > 1:
        yield "adapters are of two kinds, LoRA and DoRA; a file has one."
    has_dora = any(isinstance(each, DoRAEinsum) for each in found.values())
    for path, adapter in found.items():
        if isinstance(adapter, LoRAEmbedding):
            uses = [layer.use for layer in layers(adapter)]
            if uses.count(adapter.use) > 1 or "both" in uses and len(uses) > 1:
                yield f"{path}: one adapter is around another; merge the inner one."
            if has_dora:
                yield f"{path}: others are DoRA, which embeddings do not have; a file has one kind."
            continue
        if path not in names:
            yield f"{path}: PEFT adapts linear maps of single weights, this is none."
        if isinstance(adapter.base, Adapter):
            yield f"{path}: one adapter is around another; merge the inner one."


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
        tensors = {_DOWN: down.reshape(-1, rank).T, _UP: up.reshape(rank, -1).T}
        if length is not None:
            tensors[MAGNITUDE] = length
        yield _Part(tensors, rank, adapter.scale)


def _embedding_parts(adapter: LoRAEmbedding) -> dict[str, _Part]:
    down, up = (np.asarray(array, np.float32) for array in (adapter.down, adapter.up))
    parts, rank = {}, len(down)
    if adapter.use != "decode":
        tensors = {EMBEDDING_DOWN: down.T, EMBEDDING_UP: up.T}
        parts[EMBEDDING] = _Part(tensors, rank, adapter.scale)
    if adapter.use != "encode":
        parts[HEAD] = _Part({_DOWN: down, _UP: up}, rank, adapter.scale)
    return parts


def _whole(
    model: Transformer, wanted: Sequence[str], target: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of the modules of these names."""
    values = dict(leaves(remove(model)))
    found = set()
    for name, place in places(model.config).items():
        module = full(name.rpartition(".")[0], model.config)
        # As PEFT matches them: "norm" is every module whose name ends so.
        used = [each for each in wanted if module.endswith(each)]
        if not used:
            continue
        found |= set(used)
        if place.entry.path not in values:
            raise CheckpointError(
                f"{target} cannot be saved: {module} is prepared or quantised, and cannot be "
                "written whole."
            )
        part = place.entry.parts(np.asarray(values[place.entry.path], np.float32))[place.index]
        yield name, place.entry.part_to_theirs(part)
    if unknown := [each for each in wanted if each not in found]:
        raise CheckpointError(
            f"{target} cannot be saved: the model has no module {unknown[0]!r} of its own to save."
        )


def _config(parts: Mapping[str, _Part], config: ModelConfig, base: str | None) -> dict[str, Any]:
    usual = next(iter(parts.values()))
    named = {full(name, config): part for name, part in parts.items()}
    last = {module.rpartition(".")[2] for module in named}
    # Short names, as people write them, if they mean the same.
    everything = [EMBEDDING, *every_linear(config)]
    short = {name for name in everything if name.rpartition(".")[2] in last} == parts.keys()
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
        "use_dora": any(MAGNITUDE in part.tensors for part in parts.values()),
        "target_modules": sorted(last if short else named),
        "rank_pattern": {m: part.rank for m, part in named.items() if part.rank != usual.rank},
        "alpha_pattern": {m: part.alpha for m, part in named.items() if part.alpha != usual.alpha},
    }
