"""New adapters, which change nothing yet."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import as_float_dtype, as_key, as_number, described
from equigemma._kernels import activation_axes, result_axes
from equigemma._typing import Array, PRNGKeyArray
from equigemma.lora._adapters import (
    Adapter,
    DoRAEinsum,
    LoRAEinsum,
    dense,
    factor_axes,
    lengths,
    sizes,
)
from equigemma.lora._embedding import LoRAEmbedding
from equigemma.lora._tree import HEAD, around, parts
from equigemma.nn import AbstractEinsum, AbstractEmbedding, check_unstacked


def is_projection(path: str, einsum: AbstractEinsum) -> bool:
    """The usual choice of what to adapt: every projection of every layer, but no router.

    **Arguments:**

    - `path`: where the einsum is, such as `layers.0.attention.output`.
    - `einsum`: the einsum there.

    **Returns:** whether it is adapted.
    """
    return path.startswith("layers.") and result_axes(einsum.eqn) not in ("E", "U")


def add(
    model: Any,
    *,
    rank: int,
    key: PRNGKeyArray,
    alpha: float | None = None,
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)"] = "alpha/rank",
    kind: Literal["lora", "dora"] = "lora",
    where: Callable[[str, Any], bool] = is_projection,
    nested: bool = False,
    dtype: jnp.dtype | type | str = jnp.float32,
) -> Any:
    """The model with an adapter around every part that `where` chooses; it computes the same.

    **Arguments:**

    - `model`: a `Transformer`, or a tree with some; not stacked, prepared or quantized.
    - `rank`: of each adapter, at least 1.
    - `key`: for the random factor of each adapter; the other one is zero.
    - `alpha`: strength; the update counts alpha / rank, by default 1, or alpha / √rank.
    - `scaling`: what the update is multiplied by.
    - `kind`: `"lora"`, or `"dora"`, in which the length of each output's weights is learned apart.
    - `where`: told the path, such as `layers.0.attention.output`, and the einsum there; also
      `embedding` and `lm_head` with the embeddings there. Where these are tied, each is still a
      choice of its own, of what tokens become and of logits.
    - `nested`: also around what has an adapter already.
    - `dtype`: of the adapters.

    **Returns:** the model, whose arrays are shared with the one given.

    For adapters over 8-bit weights, quantise the model that this returns.

    **Raises:** `ValueError` for an option that makes no sense, if `where` chooses nothing, or if
    what it chooses is of a prepared or quantised model, or has an adapter; `TypeError` for an
    option of another type.

    **Source:** Hu et al. 2021, arXiv:2106.09685; for √rank Kalajdzievski 2023, arXiv:2312.03732.
    """
    _check_options(rank, scaling, kind, where)
    key, dtype = as_key("key", key), as_float_dtype("dtype", dtype)
    alpha = float(rank) if alpha is None else as_number("alpha", alpha)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}.")
    check_unstacked(model)
    everything = parts(model)
    if not everything:
        raise ValueError(f"`model` has nothing that could have an adapter, got {described(model)}.")
    chosen = {path: part for path, part in everything if where(path, part)}
    _check_chosen(chosen, rank, kind, nested)
    scale = alpha / rank if scaling == "alpha/rank" else alpha / math.sqrt(rank)
    keys = dict(zip(chosen, jax.random.split(key, len(chosen)), strict=True))
    made: dict[str, Any] = {}
    for path, part in chosen.items():
        if isinstance(part, AbstractEmbedding):
            made[path] = _new_embedding(path, part, rank, scale, keys[path], dtype)
        else:
            made[path] = _new_einsum(part, kind, rank, scale, keys[path], dtype)
    return around(made, model)


def _check_options(rank: Any, scaling: Any, kind: Any, where: Any) -> None:
    if not isinstance(rank, int | np.integer) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"An adapter needs a rank of at least 1, a whole number; got {rank!r}.")
    if scaling not in ("alpha/rank", "alpha/sqrt(rank)"):
        raise ValueError(f"scaling is 'alpha/rank' or 'alpha/sqrt(rank)', got {scaling!r}.")
    if kind not in ("lora", "dora"):
        raise ValueError(f"kind is 'lora' or 'dora', got {kind!r}.")
    if not callable(where):
        raise TypeError(
            "`where` must be a function of a path and what is there, such as `lambda path, part: "
            f"'attention' in path`; got {described(where)}."
        )


def _check_chosen(chosen: Mapping[str, Any], rank: int, kind: str, nested: bool) -> None:
    if not chosen:
        raise ValueError("No projection was chosen for an adapter; see the argument `where`.")
    taken = [path for path, part in chosen.items() if isinstance(part, Adapter | LoRAEmbedding)]
    if taken and not nested:
        raise ValueError(
            f"{taken[0]} has an adapter already: fold it in with lora.merge, drop it with "
            "lora.remove, or put another around it with nested=True."
        )
    embeddings = [path for path, part in chosen.items() if isinstance(part, AbstractEmbedding)]
    if embeddings and kind == "dora":
        raise ValueError(f"DoRA is for projections; {embeddings[0]} is an embedding. Leave it out.")
    largest = max(map(_full_rank, chosen.values()))
    if rank > largest:
        raise ValueError(
            f"rank={rank} is more than any weight chosen has, which is {largest}: it would take "
            "memory and change nothing that a smaller one does not."
        )


def _full_rank(part: Any) -> int:
    """The largest rank that a change of a weight can have."""
    if isinstance(part, AbstractEmbedding):
        return min(_table_shape(part))
    axes, (down, up) = sizes(part), factor_axes(part.eqn)
    own = (set(down) ^ set(up)) & set(axes)
    return min(math.prod(axes[axis] for axis in own & set(side)) for side in (down, up))


def _table_shape(embedding: AbstractEmbedding) -> tuple[int, int]:
    vocab, width = jax.eval_shape(lambda e: e.table, embedding).shape
    return vocab, width


def _new_einsum(
    einsum: AbstractEinsum, kind: str, rank: int, scale: float, key: Array, dtype: jnp.dtype
) -> AbstractEinsum:
    axes = sizes(einsum)
    down, up = _new(einsum.eqn, axes | {"r": rank}, key, dtype)
    shared = {"base": einsum, "down": down, "up": up, "scale": scale, "eqn": einsum.eqn}
    if kind == "lora":
        return LoRAEinsum(**shared)
    magnitude = lengths(einsum.eqn, dense(einsum, axes))
    return DoRAEinsum(**shared, magnitude=magnitude.astype(dtype))


def _new_embedding(
    path: str, embedding: AbstractEmbedding, rank: int, scale: float, key: Array, dtype: jnp.dtype
) -> LoRAEmbedding:
    vocab, width = _table_shape(embedding)
    down = jax.random.normal(key, (rank, width), dtype) * jnp.asarray(width**-0.5, dtype)
    use = "decode" if path.rpartition(".")[2] == HEAD else "encode"
    up = jnp.zeros((vocab, rank), dtype)
    return LoRAEmbedding(base=embedding, up=up, down=down, scale=scale, use=use)


def _new(eqn: str, sizes: dict[str, int], key: PRNGKeyArray, dtype: Any) -> tuple[Array, Array]:
    down_axes, up_axes = factor_axes(eqn)
    contracted = set(activation_axes(eqn)) - set(result_axes(eqn))
    fan_in = math.prod(sizes[axis] for axis in contracted)
    down = jax.random.normal(key, [sizes[axis] for axis in down_axes], dtype)
    # The upward map starts at zero, so that a new adapter changes nothing.
    up = jnp.zeros([sizes[axis] for axis in up_axes], dtype)
    return down * jnp.asarray(fan_in**-0.5, dtype), up
