"""Golden files of vision and audio encoders, and how their arrays get into a module."""

import jax
import jax.numpy as jnp
import numpy as np
import upstream


TEXT = 22
# Float32, sums in other orders, two layers, soft tokens of size 3.
CLOSE = dict(rtol=0, atol=1e-5)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(upstream.GOLDEN / f"{name}.npz") as file:
        return dict(file)


def put(module, leaves: dict[str, np.ndarray]):
    """`module` with new leaves, by their paths."""
    paths, structure = jax.tree_util.tree_flatten_with_path(module)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    assert sorted(names) == sorted(leaves)
    for name, (_, before) in zip(names, paths, strict=True):
        assert before.shape == leaves[name].shape, name
    return jax.tree.unflatten(structure, [jnp.asarray(leaves[name]) for name in names])
