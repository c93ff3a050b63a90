"""DeepMind's tiny models as they are stored: a config, variables, and what came out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import upstream

from equigemma import linen


NAMES = (
    "gemma2_gqa",
    "gemma2_mha",
    "gemma3",
    "gemma3n",
    "gemma4_k_eq_v",
    "gemma4_moe",
    "gemma4_ple_shared_kv",
)


@dataclass(frozen=True)
class Stored:
    """One file: nothing in it went through our names."""

    model: linen.Transformer
    variables: dict[str, Any]
    arrays: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def tree(self, name: str) -> dict[str, Any]:
        """The arrays below `name`, nested."""
        return nested(
            {
                key.removeprefix(f"{name}/"): value
                for key, value in self.arrays.items()
                if key.startswith(f"{name}/")
            }
        )


@cache
def stored(name: str) -> Stored:
    """The golden file `name`."""
    with np.load(upstream.GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    model = linen.Transformer.from_upstream(
        json.loads(str(arrays.pop("config"))), dtype=jnp.float32
    )
    file = Stored(model, {}, arrays)
    params = jax.tree.map(jnp.asarray, file.tree("params"))
    return Stored(model, {"params": params}, arrays)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": 1}` as `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flat(tree: Any) -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a/b": 1}`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def causal(length: int, slots: int, *, start: int = 0, rows: int = 2) -> jax.Array:
    """Tokens at `start`, ... look at all slots up to their own."""
    own = start + jnp.arange(length)
    mask = jnp.arange(slots)[None, :] <= own[:, None]
    return jnp.broadcast_to(mask, (rows, length, slots))
