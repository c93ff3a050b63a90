"""See what flows between the modules of a model, without a line in the model for it."""

from collections.abc import Callable, Collection, Mapping
from inspect import isfunction
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax import core
from jax.extend import core as jex

from equigemma._arguments import check_kind, described
from equigemma.nn._stack import Stacked


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
    experts are called by `by_expert`, with the rows of all experts in the order of those.

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

    **Raises:** `TypeError` for paths that are one string; `ValueError` for a path at which `model`
    has no module, and for a module that is called inside of another transformation than `capture`
    is, or inside of a loop.
    """
    if isinstance(paths, str) or not all(isinstance(path, str) for path in paths):
        raise TypeError(f'`paths` must be a list of str, such as ["layers.0"]; got {paths!r:.60}.')
    if not callable(function):
        raise TypeError(
            "`function` must be a function of a model, such as lambda model: model(tokens); got "
            f"{described(function)}."
        )
    check_kind("model", model, eqx.Module, "Paths are those of its parts.")
    notes = _Notes(model)
    unknown = set(paths)
    observed = _observed(model, "", unknown, notes)
    if unknown:
        raise ValueError(
            f"The model has no module at {', '.join(sorted(unknown))}. A path is written like "
            "layers.0.attention, as in jax.tree_util.keystr(path, simple=True, separator='.')."
        )
    return function(observed), notes.calls


class _Notes:
    """The calls so far. Only those of the trace in which it was made are taken."""

    def __init__(self, model: eqx.Module):
        self.calls: list[Call] = []
        self._model = model
        self._trace = _current_trace()

    def check(self, path: str) -> None:
        """Refuses a call inside of another trace: its arrays would be dead tracers.

        **Raises:** `ValueError`.
        """
        if _current_trace() != self._trace:
            raise ValueError(
                f"{path} is called inside of a loop or another transformation (jax.lax.map, scan "
                "or cond, jax.jit, grad, vmap or checkpoint), and its values do not outlive that. "
                + self._instead(path)
            )

    def _instead(self, path: str) -> str:
        node: Any = self._model
        for name in path.split("."):
            if isinstance(node, Stacked):
                return "Take the layers of a stacked model apart with eg.unstack(model)."
            node = node[int(name)] if name.isdigit() else getattr(node, name)
        parent = path.rpartition(".")[0]
        around = f"Capture a module around it, like {parent}, or call" if parent else "Call"
        return f"{around} capture inside of the transformation."


def _current_trace() -> Any:
    # From jax 0.10 on it is in `jax.extend.core`.
    home: Any = jex if hasattr(jex, "get_opaque_trace_state") else core
    return home.get_opaque_trace_state()


class _Observed(eqx.Module):
    """A module whose calls are noted. Everything else about it is as before."""

    module: Any
    path: str = eqx.field(static=True)
    notes: _Notes = eqx.field(static=True)

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        # To `isinstance`, and so to type checks, it is what it observes.
        return type(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted("__call__", self.module, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "module":
            raise AttributeError(name)
        value = getattr(self.module, name)
        if not isfunction(getattr(type(self.module), name, None)):
            return value
        return lambda *args, **kwargs: self._noted(name, value, args, kwargs)

    def _noted(self, method: str, function: Callable[..., Any], args, kwargs) -> Any:
        self.notes.check(self.path)
        result = function(*args, **kwargs)
        self.notes.calls.append(Call(self.module, self.path, method, args, kwargs, result))
        return result


def _observed(node: Any, path: str, wanted: set[str], notes: _Notes) -> Any:
    children, structure = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda leaf: leaf is not node
    )
    if isinstance(node, eqx.Module | tuple):
        keys = [jax.tree_util.keystr(key, simple=True, separator=".") for key, _ in children]
        node = jax.tree.unflatten(
            structure,
            [
                _observed(child, f"{path}.{key}" if path else key, wanted, notes)
                for key, (_, child) in zip(keys, children, strict=True)
            ],
        )
    if path not in wanted or not isinstance(node, eqx.Module):
        return node
    wanted.remove(path)
    return _Observed(node, path, notes)
