"""Products of few rows, which have a program of their own on CPU.

A product is one primitive of JAX in every program; how it is computed is decided when the program
is compiled, for CPU or anything else.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from equigemma._kernels import _native
from equigemma._kernels._always_compiled import always_compiled
from equigemma._typing import Array, Float32


FEW = 32
"""Rows up to which the kernel is faster than XLA's product, with jax 0.10.2 and 0.12.0.1; as fast
at 32 rows of int8 in groups with the latter."""

SMALL = 1 << 14
"""Numbers of a weight below which it is not worth a call."""


class Product(Protocol):
    """Activations, batch axes first, times a weight of one or several arrays, in float32.

    All methods take `x` and then those arrays. The products are the same within rounding. A product
    is static: it is hashed and compared.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """By the primitive for few rows, by `reference` for many."""
        ...

    def reference(self, *args: Any, **kwargs: Any) -> Array:
        """The product on any backend, and what is differentiated."""
        ...

    def portable(self, *args: Any, **kwargs: Any) -> Array:
        """The product on CPU without a kernel."""
        ...

    def has_kernel(self, *args: Any, **kwargs: Any) -> bool:
        """Whether there may be a kernel for these shapes and dtypes, and it is worth a call."""
        ...

    def native(self, *args: Any, **kwargs: Any) -> Array:
        """The product on CPU by `call`."""
        ...


def few_rows_or_many(
    product: Product, rows: int, x: Array, *weight: Array
) -> Float32[Array, "..."]:
    """The product, by the primitive where few rows are faster by it than by `reference`."""
    if rows == 1 or (1 < rows <= FEW and product.has_kernel(x, *weight)):
        return few_rows_p.bind(x, *weight, product=product)
    return product.reference(x, *weight)


def call(
    name: str, x: Array, *weight: Array, outputs: int, **attributes: int
) -> Float32[Array, "rows outputs"]:
    """One of `_native.CALLS`, on rows `[rows, inputs]`."""
    names = _native.calls()
    assert names is not None, "asked for before"
    result = jax.ShapeDtypeStruct((len(x), outputs), jnp.float32)
    whole = {key: np.int64(value) for key, value in attributes.items()}
    rows = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    return jax.ffi.ffi_call(names[name], result)(rows, *weight, **whole)


@partial(jax.jit, static_argnames="product")
def _on_its_own(*operands: Array, product: Product) -> Array:
    return few_rows_p.bind(*operands, product=product)


def _abstract(*operands: Any, product: Product) -> Any:
    (result,) = jax.make_jaxpr(product.reference)(*operands).out_avals
    return result


def _jvp(primals: Sequence, tangents: Sequence, *, product: Product):
    moving = [at for at, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def of_moving(*moved: Array) -> Array:
        given = dict(enumerate(primals)) | dict(zip(moving, moved, strict=True))
        return product.reference(*given.values())

    at_and_along = [primals[at] for at in moving], [tangents[at] for at in moving]
    return few_rows_p.bind(*primals, product=product), jax.jvp(of_moving, *at_and_along)[1]


def _batch(operands: Sequence, axes: Sequence, *, product: Product):
    if all(axis is None for axis in axes[1:]):
        x, *weight = operands
        return product(jnp.moveaxis(x, axes[0], 0), *weight), 0
    return jax.vmap(product.reference, axes)(*operands), 0


def _on_cpu(ctx: mlir.LoweringRuleContext, *operands: Any, product: Product):
    """The kernel, but not in what may run on another machine or is divided between devices."""

    def compute(*operands: Array) -> Array:
        if alone and product.has_kernel(*operands) and _native.calls():
            return product.native(*operands)
        return product.portable(*operands)

    module = ctx.module_context
    exported = module.lowering_parameters.for_export
    alone = not exported and getattr(module.axis_context, "num_devices", 1) == 1
    return mlir.lower_fun(compute, multiple_results=False)(ctx, *operands)


def _elsewhere(*operands: Array, product: Product) -> Array:
    return product.reference(*operands)


few_rows_p = Primitive("few_rows")
few_rows_p.def_impl(always_compiled(_on_its_own))
few_rows_p.def_abstract_eval(_abstract)
mlir.register_lowering(few_rows_p, _on_cpu, platform="cpu")
mlir.register_lowering(few_rows_p, mlir.lower_fun(_elsewhere, multiple_results=False))
ad.primitive_jvps[few_rows_p] = _jvp
batching.primitive_batchers[few_rows_p] = _batch
