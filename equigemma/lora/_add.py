"""New adapters, which change nothing yet."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from equigemma._kernels import activation_axes, result_axes
from equigemma._typing import Array, PRNGKeyArray
from equigemma.lora._adapters import DoRAEinsum, LoRAEinsum, dense, factor_axes, lengths, sizes
from equigemma.lora._tree import einsums, replace
from equigemma.nn import AbstractEinsum
from equigemma.nn._stack import check_unstacked


def is_projection(path: str, einsum: AbstractEinsum) -> bool:
    """The usual choice of what to adapt: every projection of every layer, but no router."""
    return path.startswith("layers.") and result_axes(einsum.eqn) not in ("E", "U")


def add(
    model: Any,
    *,
    rank: int,
    key: PRNGKeyArray,
    alpha: float | None = None,
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)"] = "alpha/rank",
    kind: Literal["lora", "dora"] = "lora",
    where: Callable[[str, AbstractEinsum], bool] = is_projection,
    dtype: jnp.dtype | type = jnp.float32,
) -> Any:
    """The model with an adapter around every einsum that `where` chooses; it computes the same.

    **Arguments:**

    - `rank`: of each adapter, at least 1.
    - `alpha`: strength; the update counts alpha / rank, by default 1, or alpha / √rank.
    - `where`: told the path, such as `layers.0.attention.output`, and the einsum.
    - `dtype`: of the adapters.

    For adapters over 8-bit weights, quantise the model that this returns.

    **Raises:** `ValueError` for a rank below 1, if `where` chooses nothing, or if what it chooses
    is of a prepared or quantised model.

    **Source:** Hu et al. 2021, arXiv:2106.09685; for √rank Kalajdzievski 2023, arXiv:2312.03732.
    """
    check_unstacked(model)
    if rank < 1:
        raise ValueError(f"An adapter needs a rank of at least 1, got {rank}.")
    alpha = float(rank) if alpha is None else float(alpha)
    scale = alpha / rank if scaling == "alpha/rank" else alpha / math.sqrt(rank)
    chosen = [path for path, einsum in einsums(model) if where(path, einsum)]
    if not chosen:
        raise ValueError("No projection was chosen for an adapter; see the argument `where`.")
    keys = dict(zip(chosen, jax.random.split(key, len(chosen)), strict=True))

    def adapted(path: str, einsum: AbstractEinsum) -> AbstractEinsum:
        if path not in keys:
            return einsum
        axes = sizes(einsum)
        down, up = _new(einsum.eqn, axes | {"r": rank}, keys[path], jnp.dtype(dtype))
        shared = {"base": einsum, "down": down, "up": up, "scale": scale, "eqn": einsum.eqn}
        if kind == "lora":
            return LoRAEinsum(**shared)
        magnitude = lengths(einsum.eqn, dense(einsum, axes))
        return DoRAEinsum(**shared, magnitude=magnitude.astype(dtype))

    return replace(model, adapted)


def _new(eqn: str, sizes: dict[str, int], key: PRNGKeyArray, dtype: Any) -> tuple[Array, Array]:
    down_axes, up_axes = factor_axes(eqn)
    contracted = set(activation_axes(eqn)) - set(result_axes(eqn))
    fan_in = math.prod(sizes[axis] for axis in contracted)
    down = jax.random.normal(key, [sizes[axis] for axis in down_axes], dtype)
    # The upward map starts at zero, so that a new adapter changes nothing.
    up = jnp.zeros([sizes[axis] for axis in up_axes], dtype)
    return down * jnp.asarray(fan_in**-0.5, dtype), up
