"""Whole models: floats to integers, back, and what is lost."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import activation_axes, result_axes, weight_axes
from equigemma._prepare import MatrixEinsum, Model, prepare
from equigemma._typing import Array, Float, Float32, typed
from equigemma.nn import Einsum, Embedding, Transformer
from equigemma.quantize._groupwise import GroupwiseEinsum, GroupwiseEmbedding, GroupwiseExperts
from equigemma.quantize._int4_groups import Int4Groups, int4_groups
from equigemma.quantize._int8_groups import Int8Groups, column_cuts, int8_groups
from equigemma.quantize._per_channel import Int8Einsum, Int8Embedding, Int8Experts, rounded_rows


@typed
def int8(model: Model, *, group_size: int | None = None) -> Model:
    """`prepare(model)` with its matrices and embeddings in 8 bits, behind the same interface.

    Round to nearest, weights only: no data is needed, and `quantization_error` says what it costs.
    What is quantized already stays as it is.

    **Arguments:**

    - `model`: a `Transformer` or an `Embedder`, plain, prepared, or with adapters.
    - `group_size`: so many weights of a row share a scale, in float16; with 32 the integers and
      scales are those of Q8_0 in `.gguf` files. By default a row has one scale, in float32 (per
      channel).

    **Returns:** a model of the same class and call signature.

    **Raises:** `ValueError` if `group_size < 1`.
    """
    if group_size is not None:
        _check_group(group_size)
    return jax.tree.map(
        partial(_narrowed, group_size=group_size), prepare(model), is_leaf=_is_matrix
    )


@typed
def int4(model: Model, *, group_size: int = 32) -> Model:
    """`prepare(model)` with its matrices in 4 bits, in groups, for memory rather than for speed.

    Embeddings, with which logits are made, are in 8 bits in the same groups. Groups of 32 are
    rounded as those of Q4_0 in `.gguf` files. What is quantized already stays as it is.

    **Arguments:**

    - `model`: as for `int8`.
    - `group_size`: so many weights of a row share a scale, in float16.

    **Returns:** a model of the same class and call signature.

    **Raises:** `ValueError` if `group_size < 1`.
    """
    _check_group(group_size)
    narrowed = partial(_narrowed, group_size=group_size, make=int4_groups)
    return jax.tree.map(narrowed, prepare(model), is_leaf=_is_matrix)


def _check_group(group_size: int) -> None:
    if group_size < 1:
        raise ValueError(f"A group needs at least one number, got group_size={group_size}.")


def quantization_of(model: Any) -> dict[str, str]:
    """Quantization of each quantized part, by its path: `"int8"`, in groups of 32 `"int8/32"`.

    **Arguments:** `model`: a model in any form.

    **Returns:** names of quantizations by path, such as `layers.0.attention.output`; empty for a
    model that is not quantized.
    """
    return {name: kind for name, part in _matrices(model).items() if (kind := _kind(part))}


def quantize_like(model: Transformer, quantization_of: Mapping[str, str]) -> Transformer:
    """A prepared model with these parts quantized; the inverse of `quantization_of`.

    **Arguments:**

    - `model`: what `prepare` returns.
    - `quantization_of`: what the function of that name returns.

    **Returns:** a model of the same class and call signature.

    **Raises:** `ValueError` for a place that the model does not have, or an unknown quantization.
    """
    if unknown := sorted(quantization_of.keys() - _matrices(model).keys()):
        raise ValueError(f"there is no matrix at {unknown[0]}")

    def rounded(path: Any, part: Any):
        if (kind := quantization_of.get(_name(path))) is None:
            return part
        if kind == "int8":
            return _in_rows(part)
        if not (match := re.fullmatch("int([48])/([1-9][0-9]{0,5})", kind)):
            raise ValueError(f"{_name(path)} has an unknown quantization, {kind!r}")
        make = int4_groups if match[1] == "4" else int8_groups
        return _in_groups(part, int(match[2]), make)

    return jax.tree_util.tree_map_with_path(rounded, model, is_leaf=_is_matrix)


def _kind(part: Any) -> str | None:
    match part:
        case Int8Einsum() | Int8Experts() | Int8Embedding():
            return "int8"
        case GroupwiseEinsum():
            groups = part.matrices[0]
        case GroupwiseExperts() | GroupwiseEmbedding():
            groups = part.weight
        case _:
            return None
    return f"int{4 if isinstance(groups, Int4Groups) else 8}/{groups.group_size}"


@typed
def dequantize(model: Model) -> Model:
    """`model` with all weights as floats again: what rounding made of them, not what they were.

    **Arguments:** `model`: a `Transformer`, or an `Embedder` around one.

    **Returns:** a model of the same class and call signature, without integers.
    """
    inner = jax.tree.leaves(model, is_leaf=lambda part: isinstance(part, Transformer))
    dtype = next((part.dtype for part in inner if isinstance(part, Transformer)), None)
    if dtype is None:
        raise ValueError(
            f"dequantize takes a Transformer, or an Embedder around one; got a "
            f"{type(model).__name__}."
        )
    return jax.tree.map(partial(_widened, dtype=dtype), model, is_leaf=_is_matrix)


@typed
def quantization_error(model: Model, quantized: Model) -> dict[str, float]:
    """Quantization error of each weight: norm of the error relative to that of the weight.

    **Arguments:**

    - `model`: the model before it was quantized.
    - `quantized`: the same model after it.

    **Returns:** for each quantized weight ‖after − before‖ / ‖before‖, by its path in `quantized`.
    """
    before, after = _matrices(prepare(model)), _matrices(quantized)
    return {
        name: float(_relative_error(_floats(before[name]), _floats(part)))
        for name, part in after.items()
        if isinstance(part, _Narrow)
    }


_Narrow = (
    Int8Einsum
    | Int8Experts
    | Int8Embedding
    | GroupwiseEinsum
    | GroupwiseExperts
    | GroupwiseEmbedding
)
_Matrix = MatrixEinsum | Einsum | Embedding | _Narrow


def _is_matrix(part: Any) -> bool:
    if isinstance(part, Einsum):
        return bool(_experts(part.eqn))
    return isinstance(part, _Matrix)


def _experts(eqn: str) -> set[str]:
    """The axis that activation, weight and result all have."""
    return set(activation_axes(eqn)) & set(result_axes(eqn))


_Make = Callable[[Array, int], Int8Groups | Int4Groups]


def _narrowed(part: Any, group_size: int | None, make: _Make = int8_groups):
    match part:
        case MatrixEinsum() if {"E", "U"} & set(result_axes(part.eqn)):  # which expert, mode
            return part
        case MatrixEinsum() | Einsum() | Embedding():
            return _in_rows(part) if group_size is None else _in_groups(part, group_size, make)
    return part


def _in_rows(part: Any):
    match part:
        case MatrixEinsum():
            matrices, scale = rounded_rows(part.matrices)
            return Int8Einsum(matrices=matrices, scale=scale, eqn=part.eqn, shape=part.shape)
        case Einsum():
            eqn, by_output = _by_output(part)
            outputs = by_output.shape[: len(result_axes(eqn))]
            (rows,), scale = rounded_rows((by_output.reshape(math.prod(outputs), -1),))
            return Int8Experts(
                weight=rows.reshape(by_output.shape),
                scale=scale.reshape(outputs),
                eqn=eqn,
                axes=weight_axes(part.eqn),
            )
    (weight,), scale = rounded_rows((part.weight,))
    return Int8Embedding(weight=weight, scale=scale, activations=part.dtype)


def _in_groups(part: Any, group_size: int, make: _Make):
    match part:
        case MatrixEinsum():
            whole = jnp.concatenate(part.matrices, axis=1)
            pieces = jnp.split(whole, column_cuts(whole.shape[1], group_size), axis=1)
            matrices = tuple(make(piece, group_size) for piece in pieces)
            return GroupwiseEinsum(matrices=matrices, eqn=part.eqn, shape=part.shape)
        case Einsum():
            eqn, by_output = _by_output(part)
            outputs = by_output.shape[: len(result_axes(eqn))]
            rows = make(by_output.reshape(*outputs, -1), group_size)
            return GroupwiseExperts(weight=rows, eqn=eqn, axes=weight_axes(part.eqn))
    return GroupwiseEmbedding(int8_groups(part.weight, group_size), activations=part.dtype)


def _by_output(experts: Einsum) -> tuple[str, Float[Array, "..."]]:
    """Equation and weight, with the axes of the result before the others."""
    inputs, outputs = activation_axes(experts.eqn), result_axes(experts.eqn)
    axes = outputs + "".join(axis for axis in inputs if axis not in outputs)
    weight = jnp.einsum(f"{weight_axes(experts.eqn)}->{axes}", experts.weight)
    return f"...{inputs},{axes}->...{outputs}", weight


def _widened(part: Any, dtype: jnp.dtype):
    match part:
        case Int8Einsum() | GroupwiseEinsum():
            matrices = tuple(matrix.astype(dtype) for matrix in _floats(part))
            return MatrixEinsum(matrices=matrices, eqn=part.eqn, shape=part.shape)
        case Int8Experts() | GroupwiseExperts():
            (rows,) = _floats(part)
            stored = weight_axes(part.eqn)
            weight = rows.transpose([stored.index(axis) for axis in part.axes])
            eqn = part.eqn.replace(f",{stored}->", f",{part.axes}->")
            make = partial(Einsum, eqn, weight.shape, dtype=dtype)
            shapes = eqx.filter_eval_shape(make, key=jax.random.key(0))
            return eqx.tree_at(lambda einsum: einsum.weight, shapes, weight.astype(dtype))
        case Int8Embedding() | GroupwiseEmbedding():
            make = partial(Embedding, *part.table.shape, dtype=dtype)
            shapes = eqx.filter_eval_shape(make, key=jax.random.key(0))
            return eqx.tree_at(lambda e: e.weight, shapes, part.table.astype(dtype))
    return part


@jax.jit
def _floats(part: _Matrix) -> tuple[Float32[Array, "..."], ...]:
    """One or several arrays, rows before columns."""
    match part:
        case MatrixEinsum():
            return tuple(matrix.astype(jnp.float32) for matrix in part.matrices)
        case Int8Einsum():
            return tuple(m.astype(jnp.float32) * part.scale[:, None] for m in part.matrices)
        case GroupwiseEinsum():
            return tuple(matrix.floats() for matrix in part.matrices)
        case Einsum():
            return (_by_output(part)[1].astype(jnp.float32),)
        case Int8Experts():
            scale = part.scale.reshape(
                *part.scale.shape, *[1] * (part.weight.ndim - part.scale.ndim)
            )
            return (part.weight.astype(jnp.float32) * scale,)
        case Int8Embedding():
            return (part.weight.astype(jnp.float32) * part.scale[:, None],)
        case GroupwiseExperts() | GroupwiseEmbedding():
            return (part.weight.floats(),)
        case Embedding():
            return (part.weight.astype(jnp.float32),)


@jax.jit
def _relative_error(expected: tuple[Array, ...], actual: tuple[Array, ...]) -> Float32[Array, ""]:
    # Cut at other columns, where they are wide.
    expected, actual = (tuple(_joined(arrays)) for arrays in (expected, actual))
    error = sum(jnp.sum((b - a) ** 2) for a, b in zip(expected, actual, strict=True))
    return jnp.sqrt(error / sum(jnp.sum(a**2) for a in expected))


def _joined(arrays: tuple[Array, ...]) -> list[Array]:
    return [jnp.concatenate(arrays, axis=1)] if len(arrays) > 1 else list(arrays)


def _matrices(model: Any) -> dict[str, _Matrix]:
    parts, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_matrix)
    return {_name(path): part for path, part in parts if _is_matrix(part)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
