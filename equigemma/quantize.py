"""Weights in eight bits: the rows of a matrix are integers, and each row has one scale.

A token costs the time of reading every weight, so half the bytes are nearly twice the speed, in
half the memory. Activations, norms, sums and the cache stay as they are. Routers keep their
weights: they are small, and a wrong choice is no small error.
"""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float, Float32, Int, Int8, typed
from equigemma.nn import AbstractEinsum, Einsum, Embedding, Transformer
from equigemma.nn._einsum import activation_axes, contract, result_axes, weight_axes
from equigemma.nn._embed import AbstractEmbedding
from equigemma.prepare import MatrixEinsum, prepare, times


@typed
def int8(model: Transformer) -> Transformer:
    """`prepare(model)` with its matrices and the embedding in 8 bits, behind the same interface.

    No data is needed: see `errors` for what it costs. What is in 8 bits already stays as it is.

    **Source:** Jacob et al. 2018, arXiv:1712.05877, the symmetric case: no zero point.
    """
    return jax.tree.map(_narrowed, prepare(model), is_leaf=_is_matrix)


@typed
def dequantize(model: Transformer) -> Transformer:
    """`model` with all weights as floats again: what `int8` made of them, not what they were."""
    return jax.tree.map(partial(_widened, dtype=model.dtype), model, is_leaf=_is_matrix)


@typed
def errors(model: Transformer, quantized: Transformer) -> dict[str, float]:
    """What `int8` did to each weight: the size of the error as a share of that of the weight.

    **Arguments:** `model`: before, `quantized`: after. Names are places in `quantized`.
    """
    before, after = _matrices(prepare(model)), _matrices(quantized)
    return {
        name: float(_relative_error(_floats(before[name]), _floats(part)))
        for name, part in after.items()
        if isinstance(part, QuantEinsum | QuantExperts | QuantEmbedding)
    }


class QuantEinsum(AbstractEinsum):
    """A `MatrixEinsum` in 8 bits: sums of integers times activations, scaled at the end."""

    matrices: tuple[Int8[Array, "outputs _"], ...]
    scale: Float32[Array, " outputs"]
    eqn: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        batch = x.shape[: x.ndim - len(activation_axes(self.eqn))]
        product = times(x.reshape(*batch, -1), self.matrices)
        product = product * jnp.broadcast_to(self.scale, product.shape)
        return product.astype(x.dtype).reshape(*batch, *self.shape)


class QuantExperts(AbstractEinsum):
    """The same for all experts of a mixture: each has a matrix with one row for each output.

    Its equation has the axes of the result before the others, and experts first in both arrays.
    """

    weight: Int8[Array, "..."]
    scale: Float32[Array, "..."]
    eqn: str = eqx.field(static=True)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        product = contract(self.eqn, x, self.weight, jnp.float32)
        return (product * jnp.broadcast_to(self.scale, product.shape)).astype(x.dtype)


class QuantEmbedding(AbstractEmbedding):
    """An `Embedding` in 8 bits, and the dtype of activations, which it no longer shows."""

    weight: Int8[Array, "V D"]
    scale: Float32[Array, " V"]
    activations: jnp.dtype = eqx.field(static=True)

    @property
    def dtype(self) -> jnp.dtype:
        return self.activations

    @property
    def table(self) -> Float[Array, "V D"]:
        (rows,) = _floats(self)
        return rows.astype(self.dtype)

    @typed
    def encode(self, tokens: Int[Array, "*B L"]) -> Float[Array, "*B L D"]:
        rows = self.weight[tokens].astype(jnp.float32) * self.scale[tokens][..., None]
        return rows.astype(self.dtype) * jnp.sqrt(rows.shape[-1]).astype(self.dtype)

    @typed
    def decode(self, x: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        logits = contract("...D,VD->...V", x, self.weight, jnp.float32)
        return logits * jnp.broadcast_to(self.scale, logits.shape)


_Matrix = MatrixEinsum | Einsum | Embedding | QuantEinsum | QuantExperts | QuantEmbedding


def _is_matrix(part) -> bool:
    if isinstance(part, Einsum):
        return bool(_experts(part.eqn))
    return isinstance(part, _Matrix)


def _experts(eqn: str) -> set[str]:
    """The axis that activation, weight and result all have."""
    return set(activation_axes(eqn)) & set(result_axes(eqn))


def _narrowed(part):
    match part:
        case MatrixEinsum() if not {"E", "U"} & set(result_axes(part.eqn)):  # which expert, mode
            matrices, scale = _integers(part.matrices)
            return QuantEinsum(matrices=matrices, scale=scale, eqn=part.eqn, shape=part.shape)
        case Einsum():
            eqn, by_output = _by_output(part)
            (rows,), scale = _integers((_rows(by_output, eqn),))
            outputs = by_output.shape[: len(result_axes(eqn))]
            return QuantExperts(
                weight=rows.reshape(by_output.shape), scale=scale.reshape(outputs), eqn=eqn
            )
        case Embedding():
            (weight,), scale = _integers((part.weight,))
            return QuantEmbedding(weight=weight, scale=scale, activations=part.dtype)
    return part


def _by_output(experts: Einsum) -> tuple[str, Float[Array, "..."]]:
    """Equation and weight, with the axes of the result before the others."""
    inputs, outputs = activation_axes(experts.eqn), result_axes(experts.eqn)
    axes = outputs + "".join(axis for axis in inputs if axis not in outputs)
    weight = jnp.einsum(f"{weight_axes(experts.eqn)}->{axes}", experts.weight)
    return f"...{inputs},{axes}->...{outputs}", weight


def _rows(by_output: Array, eqn: str) -> Array:
    return by_output.reshape(math.prod(by_output.shape[: len(result_axes(eqn))]), -1)


def _widened(part, dtype: jnp.dtype):
    match part:
        case QuantEinsum():
            matrices = tuple(matrix.astype(dtype) for matrix in _floats(part))
            return MatrixEinsum(matrices=matrices, eqn=part.eqn, shape=part.shape)
        case QuantExperts():
            (rows,) = _floats(part)
            make = partial(Einsum, part.eqn, part.weight.shape, dtype=dtype)
            shapes = eqx.filter_eval_shape(make, key=jax.random.key(0))
            weight = rows.reshape(part.weight.shape).astype(dtype)
            return eqx.tree_at(lambda einsum: einsum.weight, shapes, weight)
        case QuantEmbedding():
            make = partial(Embedding, *part.weight.shape, dtype=dtype)
            shapes = eqx.filter_eval_shape(make, key=jax.random.key(0))
            return eqx.tree_at(lambda e: e.weight, shapes, part.table.astype(dtype))
    return part


@jax.jit
def _integers(
    matrices: tuple[Float[Array, "outputs _"], ...],
) -> tuple[tuple[Int8[Array, "outputs _"], ...], Float32[Array, " outputs"]]:
    """Each row divided by its scale, which makes its largest number 127 or −127, and rounded."""
    wide = [matrix.astype(jnp.float32) for matrix in matrices]
    largest = jnp.stack([jnp.abs(matrix).max(axis=1) for matrix in wide]).max(axis=0)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return tuple(jnp.round(m / scale[:, None]).astype(jnp.int8) for m in wide), scale


@jax.jit
def _floats(part: _Matrix) -> tuple[Float32[Array, "outputs _"], ...]:
    match part:
        case MatrixEinsum() | QuantEinsum():
            matrices = part.matrices
        case Einsum():
            eqn, by_output = _by_output(part)
            matrices = (_rows(by_output, eqn),)
        case QuantExperts():
            matrices = (_rows(part.weight, part.eqn),)
        case _:
            matrices = (part.weight,)
    wide = (matrix.astype(jnp.float32) for matrix in matrices)
    if isinstance(part, QuantEinsum | QuantExperts | QuantEmbedding):
        return tuple(matrix * part.scale.reshape(-1, 1) for matrix in wide)
    return tuple(wide)


@jax.jit
def _relative_error(expected: tuple[Array, ...], actual: tuple[Array, ...]) -> Float32[Array, ""]:
    error = sum(jnp.sum((b - a) ** 2) for a, b in zip(expected, actual, strict=True))
    return jnp.sqrt(error / sum(jnp.sum(a**2) for a in expected))


def _matrices(model: Transformer) -> dict[str, _Matrix]:
    parts, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_matrix)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): part
        for path, part in parts
        if _is_matrix(part)
    }
