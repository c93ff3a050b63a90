"""Orbax folders in the layout of DeepMind's `gemma` package, read and written by Orbax itself.

The tree is that of `_params.py`. In the older, flat layout, in which the official files came, all
names of a path but the last are one key, `transformer/layer_0/attn/q_einsum`, and every parameter
of a feed-forward is called `w`. Such folders hold no config: it follows from the shapes, if they
are those of a known variant. Folders written here keep it in Orbax's own metadata too.

**Source:** gemma `gm/ckpts/_checkpoint.py`, `gm/ckpts/_compat.py`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equigemma import variants
from equigemma.checkpoint.core._config_json import config_from_json, config_to_json
from equigemma.checkpoint.core._errors import CheckpointError, about
from equigemma.checkpoint.core._keymap import Ignore, fill, leaf_shapes, leaves, plan
from equigemma.checkpoint.core._layout import official_layout, relayout
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.checkpoint.core._stored import Opened, Progress, as_numpy, float_dtype, stored
from equigemma.checkpoint.core._tokenizer_files import FILES as TOKENIZER_FILES
from equigemma.checkpoint.core._tokenizer_files import has_tokenizer, read_tokenizer
from equigemma.checkpoint.gemma._params import check_tied, rules
from equigemma.config import DensePlusMoEConfig, FeedForwardConfig, ModelConfig, OwnKVConfig
from equigemma.nn import Transformer


_METADATA = "_METADATA"
_NOTE = "equigemma"
_FLAT = "transformer/"
_TOWER, _FLAT_TOWER = "vision_encoder/", "SigLiPFromPatches_0/"
_IGNORE = tuple(
    Ignore(name, "only the text part of the model is read")
    for name in (
        "vision_encoder/*",
        "audio_encoder/*",
        "embedder/mm_*",
        "embedder/audio_*",
    )
)
_NAMES = (
    _METADATA,
    "_CHECKPOINT_METADATA",
    "_sharding",
    "_strings.json",
    "array_metadatas",
    "checkpoint",
    "commit_success.txt",
    "d",
    "manifest.ocdbt",
)


class _Parameter(NamedTuple):
    """Where a parameter is in the tree of the folder, and what the folder says about it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


def is_orbax(folder: Path) -> bool:
    """Whether a folder is Orbax's."""
    return (folder / _METADATA).is_file() or (folder / "default" / _METADATA).is_file()


def is_part_of_orbax(path: Path) -> bool:
    """Whether something in a folder is what Orbax writes there, so that it may be replaced."""
    return path.name in (*_NAMES, *TOKENIZER_FILES) or path.name.startswith("ocdbt.process_")


def open_orbax(folder: Path, config: ModelConfig | None) -> Opened:
    """Model and tokenizer of a folder, of which only the metadata are read.

    The tokenizer is that of a `tokenizer.json` or `tokenizer.model` in the folder, or beside it.

    **Arguments:** `config`: needed where none is kept and the shapes fit no known variant.

    **Raises:** `CheckpointError` if something is missing, damaged, or not supported.
    """
    inner = _inner(folder)
    with about(folder):
        found, note = _metadata(inner)
        config = _config(found, config, note)
        model = skeleton(config)
        assignments = plan(
            leaf_shapes(model),
            rules(config),
            {key: parameter.shape for key, parameter in found.items()},
            _IGNORE,
        )

    def read_key(key: str, dtype: np.dtype) -> np.ndarray:
        with about(folder):
            return _read(inner, found[key])

    weights = {
        entry.path: stored(entry, [found[key].dtype for key in entry.keys], read_key)
        for entry in assignments
    }
    beside = folder if has_tokenizer(folder) or not has_tokenizer(folder.parent) else folder.parent
    return Opened(fill(model, weights), partial(read_tokenizer, beside))


def open_orbax_config(folder: Path) -> ModelConfig:
    """The config of a folder, from its metadata alone."""
    with about(folder):
        found, note = _metadata(_inner(folder))
        return _config(found, None, note)


def write_orbax(
    model: Transformer,
    folder: Path,
    *,
    dtype: np.dtype | None,
    flat: bool,
    progress: Progress | None,
) -> None:
    """Writes into an empty folder. All weights are in memory at once.

    **Arguments:** `dtype`: of all weights; None keeps that of each. `flat`: in the older layout.

    **Raises:** `CheckpointError` if the older layout has no place for a weight.
    """
    ocp = _orbax()
    check_tied(model.config)
    if flat and any(isinstance(layer.ffw, DensePlusMoEConfig) for layer in model.config.layers):
        raise CheckpointError(
            "the older layout has no names for experts; take the format 'orbax' instead."
        )
    for path, leaf in leaves(model):
        float_dtype(path, dtype or leaf.dtype)
    model = relayout(model, official_layout(model.config))
    weights = dict(leaves(model))
    assignments = plan(leaf_shapes(model), rules(model.config))
    dtypes = {path: float_dtype(path, dtype or leaf.dtype) for path, leaf in weights.items()}
    total = sum(math.prod(entry.shape) * dtypes[entry.path].itemsize for entry in assignments)
    done = 0
    tree: dict[str, Any] = {}
    for entry in assignments:
        array = as_numpy(weights, entry.path, dtypes[entry.path])
        *parents, name = entry.keys[0].split("/")
        if flat and parents[-1] == "mlp" and name in ("linear", "gating_einsum"):
            parents, name = [*parents, name], "w"
        if flat:
            above = "/".join(parents)
            is_tower = above.startswith(_TOWER)
            parents = [above.replace(_TOWER, _FLAT_TOWER, 1) if is_tower else _FLAT + above]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
        done += array.nbytes
        if progress is not None:
            progress(done, total, entry.path)
    # Orbax wants to make it itself.
    folder.rmdir()
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder.absolute(), tree, custom_metadata={_NOTE: config_to_json(model.config)})


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "Orbax folders need the package orbax-checkpoint, which is not installed: "
            'pip install "equigemma[orbax]".'
        ) from error
    return orbax.checkpoint


def _inner(folder: Path) -> Path:
    """Where the arrays are: those of a whole training state are a level deeper."""
    return folder if (folder / _METADATA).is_file() else folder / "default"


def _metadata(folder: Path) -> tuple[dict[str, _Parameter], Mapping[str, Any]]:
    """Every parameter under its name in the nested layout, and what `write_orbax` noted."""
    ocp = _orbax()
    with _explained(), ocp.StandardCheckpointer() as reader:
        metadata = reader.metadata(folder.absolute())
        tree = metadata.item_metadata.tree
        note = (metadata.custom_metadata or {}).get(_NOTE, {})
    root, tree = _params(tree)
    found = {}
    for path, leaf in _flatten(tree):
        is_flat = path[0].startswith(_FLAT)
        name = "/".join(path).removeprefix(_FLAT)
        if name.startswith(_FLAT_TOWER):
            name = name.replace(_FLAT_TOWER, _TOWER, 1)
        if name.startswith("stacked_layers/"):
            raise CheckpointError(
                "its layers are stacked on each other; load it with gm.ckpts.load_params, which "
                "takes them apart, and save that."
            )
        if is_flat and "/mlp/" in name:
            name = name.removesuffix("/w")
        found[name] = _Parameter((*root, *path), tuple(leaf.shape), np.dtype(leaf.dtype))
    return found, note if isinstance(note, Mapping) else {}


def _params(tree: Any) -> tuple[tuple[str, ...], Any]:
    """The parameters in a tree that may be the variables of a module or the state of a training.

    Linen's variables have them as `params`, and so have the states of Flax and DeepMind's trainers,
    where the variables may stand under `params` once more.
    """
    root: tuple[str, ...] = ()
    while isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        root, tree = (*root, "params"), tree["params"]
    return root, tree


def _flatten(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        if getattr(tree, "shape", None) is None or getattr(tree, "dtype", None) is None:
            raise CheckpointError(f"{'/'.join(above) or 'what it holds'} is no array.")
        yield above, tree
        return
    for name, value in tree.items():
        yield from _flatten(value, (*above, str(name)))


def _read(folder: Path, parameter: _Parameter) -> np.ndarray:
    ocp = _orbax()
    item: Any = 0
    arguments: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for name in reversed(parameter.path):
        item, arguments = {name: item}, {name: arguments}
    with _explained(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
            folder.absolute(),
            args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True),
        )
    for name in parameter.path:
        restored = restored[name]
    if restored.shape != parameter.shape:
        raise CheckpointError(f"{'/'.join(parameter.path)} changed while it was read.")
    return restored


@contextmanager
def _explained() -> Iterator[None]:
    """Orbax and its storage raise whatever they meet; it becomes one error of ours."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"Orbax cannot read it: {reason:.300}") from error


def _config(
    found: Mapping[str, _Parameter], given: ModelConfig | None, note: Mapping[str, Any]
) -> ModelConfig:
    if given is not None:
        check_tied(given)
        return _as_stored(given, found)
    return config_from_json(note) if note else _known_variant(found)


def _known_variant(found: Mapping[str, _Parameter]) -> ModelConfig:
    """The one variant whose parameters have these shapes; only its vocabulary may be larger."""
    embedding = found.get("embedder/input_embedding")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("it has no embedder/input_embedding with two axes.")
    shapes = {key: parameter.shape for key, parameter in found.items()}
    fitting = {}
    for name in variants.names():
        config = replace(variants.get(name), vocab=embedding.shape[0])
        if not any(key.startswith("vision_encoder/") for key in found):
            config = config.text_only()
        if config.width != embedding.shape[1]:
            continue
        with suppress(CheckpointError):
            config = _as_stored(config, found)
            plan(leaf_shapes(skeleton(config)), rules(config), shapes, _IGNORE)
            fitting[name] = config
    if len(fitting) != 1:
        names = " and ".join(fitting) or "no known variant"
        raise CheckpointError(
            f"it keeps no config, and its shapes fit {names}; pass the one meant as config=."
        )
    return fitting.popitem()[1]


def _as_stored(config: ModelConfig, found: Mapping[str, _Parameter]) -> ModelConfig:
    """The config with the axes that its weights have here, where their shapes tell."""
    layers = []
    for index, layer in enumerate(config.layers):
        attention, ffw = layer.attention, layer.ffw
        if attention.kv == OwnKVConfig(heads=attention.heads):
            is_one = f"layer_{index}/attn/qkv_einsum/w" in found
            attention = replace(attention, qkv_axes="CNDH" if is_one else "NDH,CKDH")
        gate = found.get(f"layer_{index}/mlp/gating_einsum")
        if (
            isinstance(ffw, FeedForwardConfig)
            and gate is not None
            and ffw.hidden_dim != config.width
        ):
            is_wide = gate.shape == (2, config.width, ffw.hidden_dim)
            ffw = replace(ffw, gate_axes="CDF" if is_wide else "CFD")
        layers.append(replace(layer, attention=attention, ffw=ffw))
    return replace(config, layers=tuple(layers))
