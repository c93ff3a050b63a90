"""Barriers that only programs for CPU have."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


_T = TypeVar("_T")
_S = TypeVar("_S")


def barrier_on_cpu(tree: _T) -> _T:
    """`tree`, a tree of arrays, as `jax.lax.optimization_barrier` gives it: on CPU no array is
    there before all are. On GPU and TPU it is `tree` itself.

    For what XLA on CPU would move out of a loop or compute twice, where others would lose a fusion.
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(barrier_p.bind(*leaves))


def not_hoisted(value: _T, *, until: _S) -> tuple[_T, _S]:
    """`value, until`, trees of arrays, where on CPU `value` is not there before `until` is.

    What is alike in every step of a loop is computed before it, and kept. XLA on CPU reads a slice,
    or a few rows, of bfloat16 or of integers by way of float32: of weights that a loop reads in
    parts it would convert the whole beforehand. Seen with jax 0.8.1, 0.10.2 and 0.12.0.1.

    **Arguments:** `until`: what differs from step to step.
    """
    return barrier_on_cpu((value, until))


def computed_apart(tree: _T) -> _T:
    """`tree`, of which XLA does not know that it is `tree`, on any backend.

    What is computed of it is computed again, where it would be kept if it is needed later.
    """
    return jax.lax.optimization_barrier(tree)


def _barrier(*operands: Any) -> Sequence[Any]:
    return jax.lax.optimization_barrier(operands)


def _jvp(primals: Sequence, tangents: Sequence):
    moving = [at for at, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    along = list(tangents)
    for at, tangent in zip(moving, barrier_p.bind(*(tangents[at] for at in moving)), strict=True):
        along[at] = tangent
    return barrier_p.bind(*primals), along


def _transpose(cotangents: Sequence, *operands: Any) -> Sequence:
    return cotangents


def _batch(operands: Sequence, axes: Sequence):
    return barrier_p.bind(*operands), axes


barrier_p = Primitive("barrier_on_cpu")
barrier_p.multiple_results = True
barrier_p.def_impl(_barrier)
barrier_p.def_abstract_eval(lambda *operands: operands)
mlir.register_lowering(barrier_p, mlir.lower_fun(_barrier, multiple_results=True), platform="cpu")
mlir.register_lowering(barrier_p, lambda ctx, *operands: operands)
ad.primitive_jvps[barrier_p] = _jvp
ad.primitive_transposes[barrier_p] = _transpose
batching.primitive_batchers[barrier_p] = _batch
