"""The same model with its weights in the order in which decoding reads them.

A plain model stores weights along the axes of the published checkpoints, which is what research,
training and checkpoints want. A single token wants every weight as a matrix with one row for each
output, so that a product reads memory from front to back; and few products, each large enough for
all cores. Train, shard and save the plain model.
"""

import math
from functools import partial
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._kernels import (
    LONGEST_ROW,
    activation_axes,
    contract,
    contract_experts,
    result_axes,
    weight_axes,
)
from equigemma._typing import Array, Float, Float32, Int, Shaped, typed
from equigemma.nn import (
    AbstractEinsum,
    AbstractExpertEinsum,
    AbstractProjection,
    DotProductAttention,
    Einsum,
    Implementation,
    JaxAttention,
    SplitProjection,
    StackedProjection,
    TokamaxAttention,
    Vision,
    check_models,
    check_unstacked,
)


Model = TypeVar("Model", bound=eqx.Module)
"""A module that holds a model: a `Transformer`, or what is around one."""


@typed
def prepare(model: Model, *, attention: Implementation | Literal["tokamax"] | None = None) -> Model:
    """`model` for decoding: equal results and the same interface, several times as fast on CPU.

    On CPU, products of few rows are left to a kernel in C++, which is built once for a machine when
    a program is first compiled that calls it; that takes some seconds and a compiler. Without one,
    a sentence says so, and JAX computes them. `EQUIGEMMA_NATIVE=0` chooses that.

    Queries, keys and values come from one matrix; every matrix is stored by output. The embedding
    is so already and is shared with `model`; all else is copied, so drop the plain model where
    memory is short. Preparing twice changes nothing. An `Embedder` is prepared with its maps.

    **Arguments:**

    - `model`: a `Transformer`, or an `Embedder` around one; not a stacked one.
    - `attention`: None is our own. `"xla"` and `"cudnn"` are those of
      `jax.nn.dot_product_attention`, in layers without a soft cap. `"cudnn"` is for NVIDIA's GPUs,
      which only running the model needs. `"tokamax"` is `tokamax.dot_product_attention`, in all
      layers, and needs `pip install "equigemma[tokamax]"` and Python 3.12 or newer. What they gain
      has not been measured. A query that attends to nothing, as at padding, gives zeros in them.

    **Returns:** a model of the same class and call signature.

    **Raises:** `ImportError` for `"tokamax"` without that library.

    ```python
    >>> import equigemma as eg, jax
    >>> from dataclasses import replace
    >>> config = eg.variants.get("gemma3-270m")
    >>> small = replace(config, vocab=1_000, layers=config.layers[:1])
    >>> model = eg.prepare(eg.Transformer(small, key=jax.random.key(0)))
    >>> model.layers[0].attention.projection.qkv.matrices[0].shape
    (1536, 640)

    ```
    """
    check_unstacked(model)
    check_models(model)
    # A vision tower never reads one row alone, and in 8 bits it would not be what was trained.
    leaves = (DotProductAttention, Vision)
    return jax.tree.map(
        partial(_prepared, attention=attention),
        model,
        is_leaf=lambda part: _is_plain(part) or isinstance(part, leaves),
    )


class MatrixEinsum(AbstractExpertEinsum):
    """A dense weight as a matrix with one row for each output.

    Rows and columns are the flattened axes of the equation; `shape` is that of one result. A wide
    matrix is cut into several of about equally many columns.
    """

    matrices: tuple[Float[Array, "outputs _"], ...]
    eqn: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        batch = x.shape[: x.ndim - len(activation_axes(self.eqn))]
        product = matmul_t(x.reshape(*batch, -1), self.matrices)
        return product.astype(x.dtype).reshape(*batch, *self.shape)

    def by_expert(
        self, x: Float[Array, "rows ..."], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows ..."]:
        product = matmul_t_by_expert(x.reshape(len(x), -1), self.matrices, expert)
        return product.astype(x.dtype).reshape(-1, *self.shape)


class JoinedProjection(AbstractProjection):
    """Queries, keys and values from one weight. Its equation counts the heads of all three as N."""

    qkv: AbstractEinsum
    query_heads: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*B L D"]):
        heads = self.qkv(x)
        keys, values = jnp.split(heads[..., self.query_heads :, :], 2, axis=-2)
        return heads[..., : self.query_heads, :], keys, values


@typed
def matmul_t(
    x: Float[Array, "*B inputs"], matrices: tuple[Shaped[Array, "outputs _"], ...]
) -> Float32[Array, "*B outputs"]:
    """`x` times the transpose of a matrix that is cut into groups of columns, in float32."""
    products = (
        contract("...D,FD->...F", part, matrix, jnp.float32)
        for part, matrix in zip(_cut(x, matrices), matrices, strict=True)
    )
    return sum(products, start=jnp.zeros((), jnp.float32))


@typed
def matmul_t_by_expert(
    x: Float[Array, "rows inputs"],
    matrices: tuple[Shaped[Array, "experts outputs _"], ...],
    expert: Int[Array, " rows"],
) -> Float32[Array, "rows outputs"]:
    """The same where every row has a matrix of its own; rows are sorted by `expert`."""
    products = (
        contract_experts("...D,FD->...F", part, stack, expert, jnp.float32)
        for part, stack in zip(_cut(x, matrices), matrices, strict=True)
    )
    return sum(products, start=jnp.zeros((), jnp.float32))


def _cut(x: Array, matrices: tuple[Array, ...]) -> list[Array]:
    cuts = np.cumsum([matrix.shape[-1] for matrix in matrices])[:-1]
    return jnp.split(x, cuts, axis=-1)


def _is_plain(part: Any) -> bool:
    match part:
        case SplitProjection(q=Einsum(), kv=Einsum()) | StackedProjection(qkv=Einsum()):
            return True
        case Einsum():
            # Experts have an axis of their own in the activation: one is picked before the product.
            return not set(activation_axes(part.eqn)) & set(result_axes(part.eqn))
    return False


def _prepared(part: Any, attention: Any):
    match part:
        case DotProductAttention() if attention == "tokamax":
            return TokamaxAttention(part.softcap)
        case DotProductAttention(softcap=None) if attention is not None:
            return JaxAttention(implementation=attention)
        case SplitProjection(q=Einsum() as q, kv=Einsum() as kv):
            return _joined(q, kv)
        case StackedProjection(qkv=Einsum() as qkv):
            return _joined(qkv)
        case Einsum():
            return _matrix(part.eqn, _by_output(part))
    return part


def _joined(*weights: Einsum) -> JoinedProjection:
    stored = [_by_output(weight) for weight in weights]  # [N H D] and [C K H D], or [C N H D]
    heads = [weight.reshape(-1, *weight.shape[-2:]) for weight in stored]
    qkv = _matrix("...D,NHD->...NH", jnp.concatenate(heads))
    return JoinedProjection(qkv, query_heads=stored[0].shape[-3])


def _by_output(einsum: Einsum) -> Float[Array, "..."]:
    axes = result_axes(einsum.eqn) + activation_axes(einsum.eqn)
    return jnp.einsum(f"{weight_axes(einsum.eqn)}->{axes}", einsum.weight)


def _matrix(eqn: str, weight: Float[Array, "..."]) -> MatrixEinsum:
    """`weight` has the axes of the result first, then those of the activation."""
    shape = weight.shape[: len(result_axes(eqn))]
    matrix = weight.reshape(math.prod(shape), -1)
    pieces = -(-matrix.shape[1] // LONGEST_ROW)
    matrices = tuple(jnp.array_split(matrix, pieces, axis=1))
    return MatrixEinsum(matrices=matrices, eqn=eqn, shape=shape)
