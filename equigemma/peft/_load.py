"""Adapter files to models with adapters."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from equigemma._kernels import weight_axes
from equigemma._typing import typed
from equigemma.checkpoint import CheckpointError
from equigemma.checkpoint.core import about, read_json
from equigemma.config import ModelConfig
from equigemma.lora import Adapter, DoRAEinsum, LoRAEinsum, LoRAEmbedding, einsums
from equigemma.lora._adapters import dense, factor_axes, lengths, sizes
from equigemma.lora._tree import around
from equigemma.nn import AbstractEinsum, AbstractEmbedding, Transformer
from equigemma.peft._file import (
    CONFIG,
    DOWN,
    EMBEDDING_DOWN,
    EMBEDDING_UP,
    MAGNITUDE,
    ROWS,
    UP,
    WEIGHTS,
    AdapterFile,
    adapted,
    read_file,
)
from equigemma.peft._names import EMBEDDING, HEAD, TOWER, every_linear, experts, modules
from equigemma.peft._settings import Settings, read_settings
from equigemma.peft._starts import beginning
from equigemma.peft._whole import with_rows, with_whole_weights


@typed
def load(model: Transformer, path: str | os.PathLike[str]) -> Transformer:
    """`model` with the adapters of a folder, in float32, around its parts.

    ```python
    >>> import equigemma as eg
    >>> from equigemma import peft
    >>> model, tokenizer = eg.load("google/gemma-3-270m")  # doctest: +SKIP
    >>> model = peft.load(model, "adapter")  # doctest: +SKIP

    ```

    It computes what PEFT computes with this file and this base. Weights that the file holds whole
    (`modules_to_save`, rows of `trainable_token_indices`) take the place of the model's; where only
    one use of a tied embedding is meant, the model is untied. `save` writes adapters alone, unless
    it is told of such weights.

    **Arguments:**

    - `model`: as `equigemma.load` gives it; quantise or prepare it afterwards.
    - `path`: of a folder with `adapter_config.json` and `adapter_model.safetensors`.

    **Returns:** the model with its adapters, to be trained further, merged or used.

    **Raises:** `CheckpointError` if the folder is damaged, is for another model, or holds what is
    not supported here; `ImportError` if `safetensors` is not installed.
    """
    folder = Path(path).expanduser()
    with about(folder):
        settings = read_settings(read_json(folder / CONFIG))
        file = read_file(folder / WEIGHTS)
        _check_targets(settings, file, model.config)
        plain = with_rows(with_whole_weights(model, settings, file), settings, file)
        found = {**_einsum_adapters(plain, settings, file), **_experts(plain, settings, file)}
        found |= _embedding_adapters(plain, settings, file)
        _check_rest(file, model.config)
        if not found and plain is model:
            raise CheckpointError("it holds no adapters.")
        return around(found, plain)


def _check_targets(settings: Settings, file: AdapterFile, config: ModelConfig) -> None:
    """Refuses adapters that PEFT would leave aside, and such as it would make at random."""
    linear = set(every_linear(config))
    tables = (EMBEDDING, HEAD)
    held = set(adapted(file))
    # One of two that are tied stands for both.
    tied_target = settings.ties and any(settings.is_target(file.called(each)) for each in tables)
    for module in sorted(held):
        name = file.called(module)
        if module in tables and tied_target:
            continue
        is_expert = ".experts" in module and settings.parameters
        if not is_expert and not settings.is_target(name, is_linear=module != EMBEDDING):
            raise CheckpointError(
                f"it holds an adapter of {name}, which its target_modules leave out; PEFT would "
                "not use it."
            )
    front = {file.called(module).removesuffix(module) for module in held if module not in tables}
    if settings.start is not False and not settings.takes_from_base:
        return
    for module in sorted(linear - held):
        if any(settings.is_target(f"{each}{module}") for each in front or {""}):
            raise CheckpointError(
                f"it holds no adapter of {module}, which its target_modules name; with "
                f"init_lora_weights={settings.start!r} PEFT would make one that changes numbers."
            )


class _Factors(NamedTuple):
    """The two factors of one of PEFT's modules, and the strength of their product."""

    down: np.ndarray  # A, [r, inputs]
    up: np.ndarray  # B, [outputs, r]
    magnitude: np.ndarray | None  # [outputs]
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def _einsum_adapters(
    model: Transformer, settings: Settings, file: AdapterFile
) -> dict[str, Adapter]:
    """The adapters of linear maps."""
    inside = dict(einsums(model))
    found: dict[str, Adapter] = {}
    for path, names in modules(model.config).items():
        if any(f"{name}{DOWN}" in file for name in names):
            if path not in inside:
                raise CheckpointError(
                    f"the model has no projection {path}; load adapters before `prepare`."
                )
            found[path] = _adapter(inside[path], names, settings, file)
    return found


def _adapter(
    einsum: AbstractEinsum, names: tuple[str, ...], settings: Settings, file: AdapterFile
) -> Adapter:
    """The adapter of one einsum; its tensors are taken out."""
    axes = sizes(einsum)
    down_axes, up_axes = factor_axes(einsum.eqn)
    inputs, outputs = (
        math.prod(axes[axis] for axis in letters if axis not in "Cr")
        for letters in (down_axes, up_axes)
    )
    weights = _matrices(einsum, len(names)) if settings.takes_from_base else None
    stored: list[_Factors | None] = []
    for index, name in enumerate(names):
        factors = None
        if f"{name}{DOWN}" in file:
            factors = _factors(name, (outputs, inputs), settings, file)
            if weights is not None:
                factors = _without_beginning(factors, settings, weights[index])
        stored.append(factors)
    present = [factors for factors in stored if factors is not None]
    rank = max(factors.rank for factors in present)
    # Of parts that share a strength, one may count nothing.
    scale = next((factors.scale for factors in present if factors.scale), 0.0)

    down = np.zeros((len(names), inputs, rank), np.float32)
    up = np.zeros((len(names), rank, outputs), np.float32)
    for index, factors in enumerate(stored):
        if factors is not None:
            down[index, :, : factors.rank] = factors.down.T
            # One strength for all parts; what a part's own is larger by goes into its numbers.
            share = factors.scale / scale if scale else 1.0
            up[index, : factors.rank] = factors.up.T * np.float32(share)
    shapes = ([axes.get(axis, rank) for axis in letters] for letters in (down_axes, up_axes))
    both = [jnp.asarray(array.reshape(s)) for array, s in zip((down, up), shapes, strict=True)]
    shared = {"base": einsum, "down": both[0], "up": both[1], "eqn": einsum.eqn}
    if not settings.is_dora:
        return LoRAEinsum(**shared, scale=scale)
    magnitude = np.array(lengths(einsum.eqn, dense(einsum, axes)), np.float32)
    flat = magnitude.reshape(len(names), -1)
    for index, factors in enumerate(stored):
        if factors is not None:
            flat[index] = factors.magnitude
    return DoRAEinsum(**shared, scale=scale, magnitude=jnp.asarray(magnitude))


def _factors(name: str, shape: tuple[int, int], settings: Settings, file: AdapterFile) -> _Factors:
    """The factors of a linear map `[outputs, inputs]`."""
    outputs, inputs = shape
    magnitude = None
    down, up = file.take(f"{name}{DOWN}"), file.take(f"{name}{UP}")
    if settings.is_dora:
        magnitude = file.take(f"{name}{MAGNITUDE}")
    rank = down.shape[0] if down.ndim else 0
    _check_shape(f"{name}{DOWN}.weight", down, (rank, inputs))
    _check_shape(f"{name}{UP}.weight", up, (outputs, rank))
    if magnitude is not None:
        _check_shape(f"{name}{MAGNITUDE}", magnitude, (outputs,))
    return _Factors(down, up, magnitude, _scale(name, rank, settings, file))


def _scale(name: str, rank: int, settings: Settings, file: AdapterFile) -> float:
    called = file.called(name)
    if rank != settings.rank_of(called):
        raise CheckpointError(
            f"{name} has an adapter of rank {rank}, and its config says {settings.rank_of(called)}."
        )
    return settings.scale_of(called, rank)


def _check_shape(name: str, array: np.ndarray, expected: tuple[int, ...]) -> None:
    if array.shape != expected or 0 in expected:
        raise CheckpointError(
            f"{name}: expected shape {list(expected)}, got {list(array.shape)}; the adapter is of "
            "another model."
        )


def _matrices(einsum: AbstractEinsum, parts: int) -> np.ndarray:
    """The weights that an einsum applies, `[parts, outputs, inputs]`, as PEFT has them."""
    axes = sizes(einsum)
    down_axes, up_axes = (letters.replace("r", "") for letters in factor_axes(einsum.eqn))
    order = up_axes + "".join(axis for axis in down_axes if axis not in up_axes)
    stored = weight_axes(einsum.eqn)
    weight = np.asarray(dense(einsum, axes)).transpose([stored.index(axis) for axis in order])
    inputs = math.prod(axes[axis] for axis in down_axes if axis not in up_axes)
    return weight.reshape(parts, -1, inputs)


def _without_beginning(factors: _Factors, settings: Settings, weight: np.ndarray) -> _Factors:
    """The factors with those that the adapter began with, taken off, beside them."""
    assert isinstance(settings.start, str)
    if settings.start == "pissa" and factors.scale <= 0:
        raise CheckpointError(
            f"its lora_alpha is {settings.alpha:g}, and PiSSA divides by a strength above 0: PEFT "
            "gets no number with it."
        )
    down, up = beginning(settings.start, weight, factors.rank, factors.scale)
    return factors._replace(
        down=np.concatenate([factors.down, down]), up=np.concatenate([factors.up, -up], axis=1)
    )


def _experts(model: Transformer, settings: Settings, file: AdapterFile) -> dict[str, Adapter]:
    """The adapters of parameters with an axis for experts.

    PEFT nests those of one module in each other, in an order that the shapes tell.
    """
    inside, found = dict(einsums(model)), {}
    for path, parameter in experts(model.config).items():
        module = parameter.rpartition(".")[0]
        for name in (module, f"{module}.base_layer"):
            axes = sizes(inside[path]) if path in inside else {}
            factors = _expert_factors(name, inside[path], axes, settings, file) if axes else None
            if factors is not None:
                down, up, scale = factors
                shared = {"base": inside[path], "eqn": inside[path].eqn, "scale": scale}
                found[path] = LoRAEinsum(**shared, down=jnp.asarray(down), up=jnp.asarray(up))
                break
    return found


def _expert_factors(
    name: str,
    einsum: AbstractEinsum,
    axes: Mapping[str, int],
    settings: Settings,
    file: AdapterFile,
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Our two factors of all experts, if the file's under this name have the sizes of theirs."""
    down, up = (file.tensors.get(f"{name}{kind}") for kind in (DOWN, UP))
    if down is None or up is None or down.ndim != 2 or up.ndim != 2:
        return None
    down_axes, up_axes = factor_axes(einsum.eqn)
    count = axes["E"]
    inputs = math.prod(axes[axis] for axis in down_axes if axis not in "ECr")
    outputs = math.prod(axes[axis] for axis in up_axes if axis not in "Er")
    rank, rest = divmod(down.shape[0], count)
    if rest or down.shape[1] != inputs or up.shape != (outputs, down.shape[0]):
        return None
    down, up = file.take(f"{name}{DOWN}"), file.take(f"{name}{UP}")
    scale = _scale(name.removesuffix(".base_layer"), rank, settings, file)
    # Theirs are [(E r), D] and [(C F), (r E)]; of ours each part has its own.
    parts = axes.get("C", 1)
    downs = down.reshape(count, 1, rank, inputs).swapaxes(-1, -2)
    ups = up.reshape(parts, outputs // parts, rank, count).transpose(3, 0, 2, 1)
    shapes = ([axes.get(axis, rank) for axis in letters] for letters in (down_axes, up_axes))
    down_shape, up_shape = shapes
    downs = np.broadcast_to(downs, (count, parts, inputs, rank))
    return downs.reshape(down_shape), ups.reshape(up_shape), scale


def _embedding_adapters(
    model: Transformer, settings: Settings, file: AdapterFile
) -> dict[str, LoRAEmbedding]:
    """The adapters of the embedding and of the output projection."""
    found = {}
    if f"{EMBEDDING}{EMBEDDING_DOWN}" in file:
        names = f"{EMBEDDING}{EMBEDDING_DOWN}", f"{EMBEDDING}{EMBEDDING_UP}"
        down, up = file.take(names[0]).T, file.take(names[1]).T
        found["embedding"] = _embedding_adapter(model, EMBEDDING, down, up, settings, file)
    if f"{HEAD}{DOWN}" in file:
        if settings.takes_from_base:
            raise CheckpointError(
                f"it has an adapter of {HEAD} with init_lora_weights={settings.start!r}, which is "
                "supported for projections alone."
            )
        down, up = file.take(f"{HEAD}{DOWN}"), file.take(f"{HEAD}{UP}")
        found["lm_head"] = _embedding_adapter(model, HEAD, down, up, settings, file)
    if found and settings.is_dora:
        raise CheckpointError(f"it has use_dora for {min(found)}; only projections have DoRA here.")
    if settings.ties and model.lm_head is None and len(found) == 2 and _are_one(*found.values()):
        return {"embedding": replace(found["embedding"], use="both")}
    return found


def _are_one(first: LoRAEmbedding, second: LoRAEmbedding) -> bool:
    """Whether two adapters have the same numbers."""
    same = np.array_equal(first.up, second.up) and np.array_equal(first.down, second.down)
    return same and first.scale == second.scale


def _embedding_adapter(
    model: Transformer,
    name: str,
    down: np.ndarray,
    up: np.ndarray,
    settings: Settings,
    file: AdapterFile,
) -> LoRAEmbedding:
    part: Any = model.embedding if name == EMBEDDING else model.output_embedding
    if not isinstance(part, AbstractEmbedding):
        raise CheckpointError(f"the model's {name} is a {type(part).__name__}, not an embedding.")
    vocab, width = model.config.vocab, model.config.width
    rank = down.shape[0] if down.ndim else 0
    _check_shape(f"{name}{DOWN}.weight", down, (rank, width))
    _check_shape(f"{name}{UP}.weight", up, (vocab, rank))
    return LoRAEmbedding(
        base=part,
        up=jnp.asarray(up),
        down=jnp.asarray(down),
        scale=_scale(name, rank, settings, file),
        use="encode" if name == EMBEDDING else "decode",
    )


def _check_rest(file: AdapterFile, config: ModelConfig) -> None:
    """Refuses what was not used, unless it changes no number."""
    left = sorted(name for name in file.tensors if not _is_unread(name, config))
    if not left:
        return
    biases = [name for name in left if name.endswith(f"{UP}.bias")]
    if biases:
        raise CheckpointError(f"it has lora_bias, {biases[0]}, which is not supported here.")
    rows = [name for name in left if name.endswith(ROWS)]
    if rows:
        raise CheckpointError(f"it holds rows of {rows[0].removesuffix(ROWS)}, which has none.")
    raise CheckpointError(f"it holds what this model has no place for: {', '.join(left[:5])}.")


def _is_unread(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is of a part that no number depends on."""
    if name.startswith((TOWER, "multi_modal_projector.")) and config.vision is None:
        return True
    # What its backward pass alone reads stands beside an adapter of VeLoRA.
    if name.startswith(f"{TOWER}head.") or name.endswith(".lora_velora_embed"):
        return True
    layer, _, part = name.removeprefix("layers.").partition(".")
    shares = layer.isdecimal() and int(layer) < len(config.layers)
    if not name.startswith("layers.") or not shares or config.owner(int(layer)) == int(layer):
        return False
    return part.startswith(("self_attn.k_proj.", "self_attn.v_proj.", "self_attn.k_norm."))
