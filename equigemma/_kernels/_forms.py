"""Products of one row in the forms that XLA on CPU compiles well, for where no kernel is built.

No form is fast in every version of XLA, and most are slow by a factor of ten in some. So the choice
is a table, of what `benchmarks/forms.py` measured.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from equigemma._typing import Array, Float, Float32, Shaped


LONGEST_ROW = 4095
"""XLA on CPU before 0.11 fuses a conversion into a product with a vector of less than 16 kB."""

Matrix = Shaped[Array, "outputs _"]
Convert = Callable[..., Float32[Array, "outputs inputs"]]
Row = Float[Array, " inputs"]
Form = Callable[[Convert, tuple[Matrix, ...], Row], Float32[Array, " outputs"]]
"""`convert(*operands)` times a row, converting in registers only. Operands are tied to the row:
what is alike in every step of a loop would be converted before it, to be kept in memory."""


def transposed(convert: Convert, operands: tuple[Matrix, ...], row: Row) -> Float32[Array, " _"]:
    """The row times the transpose, in the layout that makes this the same bytes.

    A conversion is fused into a product with a vector, unless a pass that knows default layouts
    only has made the vector a matrix of one column.
    """
    operands, row = jax.lax.optimization_barrier((operands, row))
    columns = (with_layout_constraint(y.T, Layout(major_to_minor=(1, 0))) for y in operands)
    # Numbers one after the other. Were they several heads before, a product into which the change
    # of shape is fused takes ten times as long.
    vector = with_layout_constraint(row.astype(jnp.float32), Layout(major_to_minor=(0,)))
    return jnp.dot(vector, convert(*(y.T for y in columns)).T)


def dot(convert: Convert, operands: tuple[Matrix, ...], row: Row) -> Float32[Array, " _"]:
    """A matrix in float32 times a vector."""
    operands, row = jax.lax.optimization_barrier((operands, row))
    return jnp.dot(convert(*operands), row.astype(jnp.float32))


def summed(convert: Convert, operands: tuple[Matrix, ...], row: Row) -> Float32[Array, " _"]:
    """A sum over products of numbers."""
    operands, row = jax.lax.optimization_barrier((operands, row))
    matrix = convert(*operands)
    return (matrix * jnp.broadcast_to(row.astype(jnp.float32), matrix.shape)).sum(axis=1)


FORMS: dict[str, Form] = {"transposed": transposed, "dot": dot, "summed": summed}

MEASURED: list[tuple[tuple[int, int], dict[str, str]]] = [
    ((0, 11), {"float32": "dot", "bfloat16": "summed", "int8": "summed", "groups": "summed"}),
    ((0, 0), dict.fromkeys(("float32", "bfloat16", "int8", "groups"), "transposed")),
]
"""From which version of jax on which form is the fastest, by how weights are stored: newest first.

Measured with 0.8.1 and 0.10.2, and with 0.12.0.1. From 0.11 on, XLA on CPU has other emitters, and
leaves some products to a library (https://github.com/jax-ml/jax/issues/37465).
"""


def fastest(stored: str, version: tuple[int, ...] = jax.__version_info__) -> Form:
    """The form that `MEASURED` names for weights stored so; for other dtypes, that of bfloat16."""
    names = next(names for since, names in MEASURED if version >= since)
    return FORMS[names.get(stored, names["bfloat16"])]


def in_stored_order(
    stack: Shaped[Array, "matrices inputs outputs"], rows: Float[Array, "rows inputs"]
) -> Float32[Array, "rows all"]:
    """One product for each matrix: XLA on CPU would transpose a stack before a single one.

    Matrices of one output are the rows of a single one.
    """
    stack = stack.astype(rows.dtype)
    if stack.shape[2] == 1:
        product = partial(jnp.einsum, "zi,oi->zo", preferred_element_type=jnp.float32)
        return product(rows, stack[:, :, 0])
    each = jnp.broadcast_to(rows, (len(stack), *rows.shape))
    axes = ((2,), (1,)), ((0,), (0,))
    product = jax.lax.dot_general(each, stack, axes, preferred_element_type=jnp.float32)
    return jnp.moveaxis(product, 0, 1).reshape(len(rows), len(stack) * stack.shape[2])


def two_rows(stack: Shaped[Array, "matrices inputs outputs"], row: Row) -> Float32[Array, " all"]:
    """A product of bfloat16 with a single row converts the weight first, with two it does not."""
    copies = 2 if row.dtype.itemsize == 2 else 1
    return in_stored_order(stack, jnp.broadcast_to(row, (copies, *row.shape)))[0]
