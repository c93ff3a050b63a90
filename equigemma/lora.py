"""Low-rank adapters as tree transforms: add, split, merge.

An adapter wraps an `AbstractEinsum` of any kind, so adapters over quantised weights, or over other
adapters, need no code of their own. Nothing in `equigemma.nn` knows of them.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, PRNGKeyArray
from equigemma.nn import AbstractEinsum, Einsum
from equigemma.nn._einsum import activation_axes, contract, result_axes, weight_axes


class LoRAEinsum(AbstractEinsum):
    """`base(x) + scale · up(down(x))`, the two small maps of one rank.

    The rank is the axis r of the equations. Parts that are stored in one weight (axis C: keys and
    values, gate and up) have an adapter each, so that files of other libraries, which store them
    apart, hold the same thing.

    **Source:** Hu et al. 2021, arXiv:2106.09685.
    """

    base: AbstractEinsum
    down: Float[Array, "..."]
    up: Float[Array, "..."]
    scale: float = eqx.field(static=True)
    eqn: str = eqx.field(static=True)  # that of the base

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.base(x) + self.scale * _low_rank(self.eqn, x, self.down, self.up)


class DoRAEinsum(AbstractEinsum):
    """Like `LoRAEinsum`, with length and direction of each output's weights learned apart.

    The length of the adapted weights is taken as a constant by gradients, as the paper proposes.

    **Source:** Liu et al. 2024, arXiv:2402.09353, equations 5 and 11.
    """

    base: AbstractEinsum
    down: Float[Array, "..."]
    up: Float[Array, "..."]
    magnitude: Float[Array, "..."]
    scale: float = eqx.field(static=True)
    eqn: str = eqx.field(static=True)  # that of the base

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        adapted = self.base(x) + self.scale * _low_rank(self.eqn, x, self.down, self.up)
        weight = dense(self.base).astype(jnp.float32)
        weight = weight + self.scale * product(self.eqn, self.down, self.up)
        length = jax.lax.stop_gradient(_lengths(self.eqn, weight))
        return adapted * (self.magnitude / length).astype(adapted.dtype)


Adapter = LoRAEinsum | DoRAEinsum


def is_projection(path: str, einsum: AbstractEinsum) -> bool:
    """The usual choice of what to adapt: every projection of every layer."""
    del einsum
    return path.startswith("layers.")


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

    **Raises:** `ValueError` for a rank below 1, or if `where` chooses nothing.

    **Source:** Hu et al. 2021, arXiv:2106.09685; for √rank Kalajdzievski 2023, arXiv:2312.03732.
    """
    if rank < 1:
        raise ValueError(f"An adapter needs a rank of at least 1, got {rank}.")
    alpha = float(rank) if alpha is None else alpha
    scale = alpha / rank if scaling == "alpha/rank" else alpha / math.sqrt(rank)
    chosen = [path for path, einsum in einsums(model) if where(path, einsum)]
    if not chosen:
        raise ValueError("No projection was chosen for an adapter; see the argument `where`.")
    keys = dict(zip(chosen, jax.random.split(key, len(chosen)), strict=True))

    def adapted(path: str, einsum: AbstractEinsum) -> AbstractEinsum:
        if path not in keys:
            return einsum
        sizes = jax.eval_shape(dense, einsum).shape
        down, up = _new(einsum.eqn, sizes, rank, keys[path], jnp.dtype(dtype))
        shared = {"base": einsum, "down": down, "up": up, "scale": scale, "eqn": einsum.eqn}
        if kind == "lora":
            return LoRAEinsum(**shared)
        magnitude = _lengths(einsum.eqn, dense(einsum).astype(jnp.float32))
        return DoRAEinsum(**shared, magnitude=magnitude.astype(dtype))

    return replace(model, adapted)


def trainable(model: Any) -> Any:
    """A tree of booleans, true at the arrays of adapters: for `eqx.partition` and `train.init`."""

    def mark(part: Any) -> Any:
        if not _is_adapter(part):
            return False
        inner = jax.tree.map(lambda _: True, part)
        return eqx.tree_at(lambda adapter: adapter.base, inner, trainable(part.base))

    return jax.tree.map(mark, model, is_leaf=_is_adapter)


def split(model: Any) -> tuple[Any, Any]:
    """Adapters, and everything else: two halves for `eqx.combine`."""
    return eqx.partition(model, trainable(model))


def merge(model: Any) -> Any:
    """The model with every adapter folded into its weight, which must be dense.

    **Raises:** `ValueError` for an adapter over a weight of another kind, such as a quantised one.
    """

    def merged(path: str, einsum: AbstractEinsum) -> AbstractEinsum:
        if not isinstance(einsum, Adapter):
            return einsum
        base = merged(path, einsum.base)
        if not isinstance(base, Einsum):
            raise ValueError(
                f"{path}: only a dense weight can take an adapter in, this one is a "
                f"{type(base).__name__}. Dequantise the model first."
            )
        weight = base.weight.astype(jnp.float32)
        weight = weight + einsum.scale * product(base.eqn, einsum.down, einsum.up)
        if isinstance(einsum, DoRAEinsum):
            lengths = _lengths(base.eqn, weight)
            weight = weight * _spread(base.eqn, einsum.magnitude / lengths)
        return eqx.tree_at(lambda e: e.weight, base, weight.astype(base.weight.dtype))

    return replace(model, merged)


def remove(model: Any) -> Any:
    """The model without its adapters, as it was before `add`."""

    def bare(path: str, einsum: AbstractEinsum) -> AbstractEinsum:
        return bare(path, einsum.base) if isinstance(einsum, Adapter) else einsum

    return replace(model, bare)


def einsums(model: Any) -> list[tuple[str, AbstractEinsum]]:
    """Path and value of every einsum of a model, outermost where they are nested."""
    parts = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_einsum)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), part)
        for path, part in parts
        if _is_einsum(part)
    ]


def replace(model: Any, new: Callable[[str, AbstractEinsum], AbstractEinsum]) -> Any:
    """The model with every einsum replaced by `new(path, einsum)`."""

    def at(path, part: Any) -> Any:
        if not _is_einsum(part):
            return part
        return new(jax.tree_util.keystr(path, simple=True, separator="."), part)

    return jax.tree_util.tree_map_with_path(at, model, is_leaf=_is_einsum)


def dense(einsum: AbstractEinsum) -> Float[Array, "..."]:
    """The weight that an einsum applies, along the axes of its equation.

    **Raises:** `ValueError` if it does not store one.
    """
    if isinstance(einsum, Einsum):
        return einsum.weight
    raise ValueError(f"A {type(einsum).__name__} has no dense weight.")


def product(eqn: str, down: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """The weight that two factors make together, in float32."""
    down_axes, up_axes = _factor_axes(eqn)
    return jnp.einsum(
        f"{down_axes},{up_axes}->{weight_axes(eqn)}",
        down.astype(jnp.float32),
        up.astype(jnp.float32),
    )


def _factor_axes(eqn: str) -> tuple[str, str]:
    """`"...D,CKDH->...CKH"` gives `"CDr"` and `"CrKH"`: a part's factors are its own."""
    inputs, outputs = activation_axes(eqn), result_axes(eqn)
    parts = "C" if "C" in outputs else ""
    return f"{parts}{inputs}r", f"{parts}r{outputs.replace('C', '')}"


def _low_rank(eqn: str, x: Array, down: Array, up: Array) -> Array:
    inputs, outputs = activation_axes(eqn), result_axes(eqn)
    down_axes, up_axes = _factor_axes(eqn)
    inner = "Cr" if "C" in outputs else "r"
    low = contract(f"...{inputs},{down_axes}->...{inner}", x, down)
    return contract(f"...{inner},{up_axes}->...{outputs}", low, up)


def _new(eqn: str, shape: tuple[int, ...], rank: int, key, dtype) -> tuple[Array, Array]:
    sizes = dict(zip(weight_axes(eqn), shape, strict=True)) | {"r": rank}
    down_axes, up_axes = _factor_axes(eqn)
    fan_in = math.prod(sizes[axis] for axis in activation_axes(eqn))
    down = jax.random.normal(key, [sizes[axis] for axis in down_axes], dtype)
    # The upward map starts at zero, so that a new adapter changes nothing.
    return down * jnp.asarray(fan_in**-0.5, dtype), jnp.zeros(
        [sizes[axis] for axis in up_axes], dtype
    )


def _lengths(eqn: str, weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """The Euclidean length of the weights of each output."""
    squares = jnp.einsum(f"{weight_axes(eqn)}->{result_axes(eqn)}", jnp.square(weight))
    return jnp.sqrt(squares)


def _spread(eqn: str, per_output: Float[Array, "..."]) -> Float[Array, "..."]:
    """Values per output, shaped to multiply the weight."""
    inputs = tuple(
        index for index, axis in enumerate(weight_axes(eqn)) if axis not in result_axes(eqn)
    )
    kept = "".join(axis for axis in weight_axes(eqn) if axis in result_axes(eqn))
    return jnp.expand_dims(jnp.einsum(f"{result_axes(eqn)}->{kept}", per_output), inputs)


def _is_einsum(part: Any) -> bool:
    return isinstance(part, AbstractEinsum)


def _is_adapter(part: Any) -> bool:
    return isinstance(part, Adapter)
