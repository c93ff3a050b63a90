"""Weights that an adapter file holds whole, or some rows of, put into a model."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma.checkpoint import CheckpointError
from equigemma.checkpoint.core import fill, leaves
from equigemma.nn import Embedding, Transformer
from equigemma.peft._file import BASE, ROWS, AdapterFile
from equigemma.peft._names import EMBEDDING, HEAD, Place, places
from equigemma.peft._settings import Settings


_TABLES = (f"{EMBEDDING}.weight", f"{HEAD}.weight")


def with_whole_weights(model: Transformer, settings: Settings, file: AdapterFile) -> Transformer:
    """The model with the weights that a file holds whole in the place of its own.

    A tied table is one for both of its uses; one of them alone gets a table of its own, as in PEFT.

    **Raises:** `CheckpointError` if something is missing, or of another size.
    """
    held = {file.called(name.rpartition(".")[0]) for name in file.tensors}
    for saved in settings.saved:
        if not any(module.endswith(saved) or f".{saved}." in module for module in held):
            raise CheckpointError(f"its modules_to_save name {saved}, which it does not hold.")
    model = _with_bases(model, file)
    if model.lm_head is None and all(name in file for name in _TABLES):
        tables = [file.tensors[name] for name in _TABLES]
        if np.array_equal(tables[0], tables[1]):
            del file.tensors[_TABLES[1]]
            table = {_TABLES[0]: places(model.config)[_TABLES[0]]}
            model = _filled(model, table, file)
    known = places(model.config)
    found = {name: known[name] for name in file.tensors if name in known}
    head = f"{HEAD}.weight" in file and model.lm_head is None
    if head or (model.lm_head is None and f"{EMBEDDING}.weight" in file):
        model = model.untied()
        known = places(model.config)
        found |= {name: known[name] for name in _TABLES if name in file}
    return _filled(model, found, file)


def _with_bases(model: Transformer, file: AdapterFile) -> Transformer:
    """The model with the weights around which a file has adapters: those of its own, as a rule."""
    known = places(model.config)
    names = [name for name in file.tensors if f"{BASE}." in name and ".lora_" not in name]
    found = {}
    for name in names:
        short = name.replace(f"{BASE}.", ".")
        tensor = file.tensors.pop(name)
        if model.lm_head is None and short == _TABLES[1]:
            # One parameter there: what comes last counts, and it can only be the same.
            short = _TABLES[0]
            if short in file and not np.array_equal(file.tensors[short], tensor):
                raise CheckpointError(f"it holds two tables for one that is tied, {name} is one.")
        if short not in known:
            raise CheckpointError(f"it holds {name}, which this model has no place for.")
        file.tensors[short] = tensor
        found[short] = known[short]
    return _filled(model, found, file)


def _filled(model: Transformer, found: Mapping[str, Place], file: AdapterFile) -> Transformer:
    if not found:
        return model
    values = dict(leaves(model))
    for name, place in found.items():
        values[place.entry.path] = _with_part(values, name, place, file.take(name))
    return fill(model, values)


def _with_part(values: Mapping[str, Any], name: str, place: Place, tensor: np.ndarray) -> jax.Array:
    """The leaf of a place with one of its parts replaced."""
    path = place.entry.path
    if path not in values:
        raise CheckpointError(
            f"it holds {name} whole, and the model has adapters, or is quantised or prepared, at "
            f"{path.rpartition('.')[0]}; load it into the plain model."
        )
    if tensor.shape != place.entry.key_shape:
        raise CheckpointError(
            f"{name}: expected shape {list(place.entry.key_shape)}, got {list(tensor.shape)}; the "
            "adapter is of another model."
        )
    leaf = np.array(values[path])
    parts = place.entry.parts(leaf)
    part = place.entry.part_to_ours(tensor).astype(leaf.dtype)
    if len(place.entry.keys) == 1 and isinstance(place.entry.rule.theirs, str):
        return jnp.asarray(part)
    parts[place.index][...] = part
    return jnp.asarray(leaf)


def with_rows(model: Transformer, settings: Settings, file: AdapterFile) -> Transformer:
    """The model with the rows of tables that were learned alone.

    **Raises:** `CheckpointError` if some are missing, or of another size.
    """
    for name in settings.tokens:
        is_tied = name == HEAD and model.lm_head is None and EMBEDDING in settings.tokens
        if f"{name}{ROWS}" not in file and not is_tied:
            raise CheckpointError(f"its trainable_token_indices name {name}, and it has no rows.")
    if f"{EMBEDDING}{ROWS}" in file:
        rows = file.take(f"{EMBEDDING}{ROWS}")
        table = _replaced(model.embedding, EMBEDDING, settings, rows)
        model = eqx.tree_at(lambda m: m.embedding, model, table)
    if f"{HEAD}{ROWS}" in file:
        rows = file.take(f"{HEAD}{ROWS}")
        model = model.untied()
        table = _replaced(model.lm_head, HEAD, settings, rows)
        model = eqx.tree_at(lambda m: m.lm_head, model, table)
    return model


def _replaced(embedding: Any, name: str, settings: Settings, rows: np.ndarray) -> Embedding:
    if not isinstance(embedding, Embedding):
        raise CheckpointError(
            f"it holds rows of {name}, and the model's is a {type(embedding).__name__}; load it "
            "into the plain model."
        )
    ids = settings.tokens.get(name, ())
    vocab, width = embedding.weight.shape
    if rows.shape != (len(ids), width) or max(ids, default=-1) >= vocab:
        raise CheckpointError(
            f"{name}{ROWS}: expected a row of {width} numbers for each of {len(ids)} tokens below "
            f"{vocab}, got {list(rows.shape)}; the adapter is of another model."
        )
    weight = np.array(embedding.weight)
    weight[list(ids)] = rows.astype(weight.dtype)
    return eqx.tree_at(lambda e: e.weight, embedding, jnp.asarray(weight))
