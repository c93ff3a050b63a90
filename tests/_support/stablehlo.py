"""What a program does before a compiler has seen it, read from its StableHLO."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jax import export
from jax.interpreters import mlir


Platform = str
"""`"cuda"` or `"tpu"`: what programs are exported for, on any machine."""


class Operation(NamedTuple):
    """One operation with the dtypes and shapes that it reads and makes."""

    name: str
    reads: tuple[tuple[str, tuple[int, ...]], ...]
    makes: tuple[tuple[str, tuple[int, ...]], ...]
    target: str | None
    """Of a custom call."""
    loops: int
    """In how many loops it is, in this function or in those that call it."""


def exported(function: Callable[..., Any], platform: Platform, *args: Any) -> list[Operation]:
    """The operations of a jitted function, for shapes or arrays."""
    # Some of the faults that are looked for JAX would not export otherwise.
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in ("LayoutConstraint", CALL)]
    program = export.export(function, platforms=[platform], disabled_checks=allowed)(*args)
    with mlir.make_ir_context():
        module = mlir.ir.Module.parse(program.mlir_module())
        functions = {_name(one): one for one in module.body.operations}
        return list(_operations(functions["main"], functions, 0))


CALL = "equigemma_product"
"""A kernel for CPU."""


def _name(function: Any) -> str:
    return mlir.ir.StringAttr(function.attributes["sym_name"]).value


def _operations(parent: Any, functions: dict[str, Any], loops: int) -> Iterator[Operation]:
    inside = loops + (parent.operation.name == "stablehlo.while")
    for region in parent.operation.regions:
        for block in region:
            for view in block:
                one = view.operation
                yield _described(one, inside)
                yield from _operations(view, functions, inside)
                if one.name in ("func.call", "call"):
                    callee = mlir.ir.FlatSymbolRefAttr(one.attributes["callee"]).value
                    yield from _operations(functions[callee], functions, inside)


def _described(one: Any, loops: int) -> Operation:
    target = None
    if one.name == "stablehlo.custom_call":
        target = mlir.ir.StringAttr(one.attributes["call_target_name"]).value
    name = one.name.removeprefix("stablehlo.")
    if name == "composite":
        name = mlir.ir.StringAttr(one.attributes["name"]).value
    reads, makes = (tuple(map(_type, values)) for values in (one.operands, one.results))
    return Operation(name, reads, makes, target, loops)


def _type(value: Any) -> tuple[str, tuple[int, ...]]:
    try:
        tensor = mlir.ir.RankedTensorType(value.type)
    except (TypeError, ValueError):
        return str(value.type), ()
    return str(tensor.element_type), tuple(tensor.shape)


def barriers(program: list[Operation]) -> list[Operation]:
    """What keeps a compiler from moving or fusing operations, or prescribes a layout."""
    kinds = ("optimization_barrier", "LayoutConstraint")
    return [one for one in program if one.name in kinds or one.target in kinds]


def calls(program: list[Operation]) -> list[str]:
    """Whom a program calls outside of itself: kernels, and Python on the host."""
    return [
        one.target
        for one in program
        # XLA's own operations that StableHLO has not, or had not with jax 0.8.1.
        if one.target is not None and not one.target.startswith(("chlo.", "mhlo."))
    ]


FUSED = {
    *("convert", "multiply", "broadcast_in_dim", "reshape", "slice", "concatenate", "transpose"),
    *("shift_left", "shift_right_arithmetic", "and", "subtract", "add"),
}
"""What a compiler computes as the next operation reads it."""


def wide_weights(program: list[Operation], sizes: set[int]) -> list[Operation]:
    """Operations that read a float32 array of the size of a weight, as it is in memory.

    Of narrow weights there is none on the way to a product of narrow numbers: what widens a weight
    is fused into what narrows it again, or reads only a few rows.
    """
    return [
        one
        for one in program
        if one.name not in FUSED
        and any(dtype == "f32" and math.prod(shape) in sizes for dtype, shape in one.reads)
    ]


def products(program: list[Operation]) -> list[Operation]:
    kinds = ("dot_general", "dot", "chlo.ragged_dot")
    return [one for one in program if one.name in kinds or one.target in kinds]
