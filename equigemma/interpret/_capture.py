"""See what flows between the modules of a model, without a line in the model for it."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax import core
from jax.extend import core as jex

from equigemma._arguments import check_kind, described
from equigemma.interpret._intercept import AbstractInterceptor, Invocation, intercepted, modules
from equigemma.nn import Stacked


class Call(NamedTuple):
    """One call of one module: which, at which `path`, what went in, what came out."""

    module: Any
    path: str
    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any


def capture(
    function: Callable[[Any], Any], model: eqx.Module, paths: Collection[str]
) -> tuple[Any, list[Call]]:
    """`function(model)`, and every call of the modules at `paths` on the way, in order.

    The calls hold the arrays of the trace in which they were made: where `jax.jit`, `jax.grad` or
    `jax.vmap` are in play, call `capture` inside of them and return what you need. A module that
    runs in a loop of its own is refused: what flows there does not outlive the loop. Projections of
    experts are called by `by_expert`, with the rows of all experts in the order of those. Where
    only some tokens are asked for (`trunk(keep=)`, prefill of a generation), layers after the last
    with keys of its own see these tokens only.

    ```python
    >>> import equigemma as eg, equinox as eqx, jax
    >>> from dataclasses import replace
    >>> from equigemma import interpret
    >>> config = eg.variants.get("gemma3-270m")
    >>> small = replace(config, vocab=1_000, layers=config.layers[:1])
    >>> model = eg.Transformer(small, key=jax.random.key(0))
    >>> tokens = jax.numpy.array([2, 818, 527])
    >>> def what_the_ffw_adds(model):
    ...     _, calls = interpret.capture(lambda model: model(tokens), model, ["layers.0.ffw"])
    ...     return calls[0].result
    >>> eqx.filter_jit(what_the_ffw_adds)(model).shape
    (3, 640)

    ```

    **Arguments:**

    - `function`: calls its argument, such as `lambda model: model(tokens)`.
    - `model`: a model, or any tree with modules.
    - `paths`: of modules, such as `layers.0.ffw`.

    **Returns:** the result, and the calls: path, arguments and result of each.

    **Raises:** `TypeError` for paths that are one string; `ValueError` for a path at which `model`
    has no module, for a module that is called inside of another transformation than `capture` is,
    or inside of a loop, and for arrays that are used outside of the transformation they are from.
    """
    if isinstance(paths, str) or not all(isinstance(path, str) for path in paths):
        raise TypeError(f'`paths` must be a list of str, such as ["layers.0"]; got {paths!r:.60}.')
    check_function(function, model)
    unknown = set(paths) - {path for path, _ in modules(model)}
    if unknown:
        raise ValueError(
            f"The model has no module at {', '.join(sorted(unknown))}. A path is written like "
            "layers.0.attention, as in jax.tree_util.keystr(path, simple=True, separator='.')."
        )
    calls: list[Call] = []
    trace = SameTrace(model)
    noting = {path: _Noting(path, _Notes(calls, trace)) for path in paths}
    return called(function, intercepted(model, noting)), calls


def check_function(function: Any, model: Any) -> None:
    """Refuses what is no function, and what is no model.

    **Raises:** `TypeError`.
    """
    if not callable(function):
        raise TypeError(
            "`function` must be a function of a model, such as lambda model: model(tokens); got "
            f"{described(function)}."
        )
    check_kind("model", model, eqx.Module, "Paths are those of its parts.")


def called(function: Callable[[Any], Any], model: Any) -> Any:
    """`function(model)`.

    **Raises:** `ValueError` for an array that is used outside of the transformation it is from.
    """
    try:
        return function(model)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "An array is used outside of the jit, grad, vmap or loop in which it was computed: "
            "call capture or patch inside of that function and return what you need from it."
        ) from error


class SameTrace:
    """The trace in which it was made. Values of another would be dead tracers after it."""

    def __init__(self, model: eqx.Module):
        self._model = model
        self._trace = _current_trace()

    def check(self, path: str) -> None:
        """Refuses a call inside of another trace.

        **Raises:** `ValueError`.
        """
        if _current_trace() != self._trace:
            raise ValueError(
                f"{path} is called inside of a loop or another transformation (jax.lax.map, scan "
                "or cond, jax.jit, grad, vmap or checkpoint), and its values do not outlive that. "
                + self._instead(path)
            )

    def _instead(self, path: str) -> str:
        parts = path.split(".")
        around = [".".join(parts[:count]) for count in range(len(parts))]
        stacked = {path for path, node in modules(self._model) if isinstance(node, Stacked)}
        if stacked & set(around):
            return "Take the layers of a stacked model apart with eg.unstack(model)."
        inside = "call capture inside of the transformation (inside jit) and return what you need."
        parent = path.rpartition(".")[0]
        return (
            f"Capture a module around it, like {parent}, or {inside}"
            if parent
            else (f"C{inside[1:]}")
        )


def _current_trace() -> Any:
    # From jax 0.10 on it is in `jax.extend.core`.
    home: Any = jex if hasattr(jex, "get_opaque_trace_state") else core
    return home.get_opaque_trace_state()


class _Notes:
    """The calls so far."""

    def __init__(self, calls: list[Call], trace: SameTrace):
        self.calls, self.trace = calls, trace


class _Noting(AbstractInterceptor):
    """Calls as they are, and notes of them."""

    path: str = eqx.field(static=True)
    notes: _Notes = eqx.field(static=True)

    @property
    def is_reader(self) -> bool:
        return True

    def scope(self, invocation: Invocation) -> AbstractContextManager:
        self.notes.trace.check(self.path)
        return nullcontext()

    def before(self, invocation: Invocation) -> tuple[Any, ...]:
        return invocation.args

    def pattern(self) -> None:
        return None

    def after(self, invocation: Invocation, result: Any) -> Any:
        module, method, _, args, kwargs = invocation
        self.notes.calls.append(Call(module, self.path, method, args, kwargs, result))
        return result
