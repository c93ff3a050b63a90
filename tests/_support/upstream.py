"""DeepMind's configs and golden files as ours."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import equigemma as eg
from equigemma.checkpoint.gemma._config_fields import config_from_upstream
from equigemma.checkpoint.gemma._params import from_params


GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Golden:
    """A tiny model of upstream's, as ours, and what upstream computed with it."""

    model: eg.Transformer
    arrays: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]


def golden(name: str) -> Golden:
    """The golden file `name`."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    config = config_from_upstream(json.loads(str(arrays.pop("config"))))
    tree: dict[str, Any] = {}
    for key in [key for key in arrays if key.startswith("params/")]:
        *parents, leaf = key.removeprefix("params/").split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(arrays.pop(key))
    return Golden(from_params(config, tree), arrays)
