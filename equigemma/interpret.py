"""See what flows between the modules of a model, without a line in the model for it."""

from collections.abc import Callable, Collection, Mapping
from inspect import isfunction
from typing import Any, NamedTuple

import equinox as eqx
import jax


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
    `jax.vmap` are in play, call `capture` inside of them and return what you need.

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

    **Raises:** `ValueError` for a path at which `model` has no module.
    """
    calls: list[Call] = []
    unknown = set(paths)
    observed = _observed(model, "", unknown, calls.append)
    if unknown:
        raise ValueError(
            f"The model has no module at {', '.join(sorted(unknown))}. A path is written like "
            "layers.0.attention, as in jax.tree_util.keystr(path, simple=True, separator='.')."
        )
    return function(observed), calls


class _Observed(eqx.Module):
    """A module whose calls are noted. Everything else about it is as before."""

    module: Any
    path: str = eqx.field(static=True)
    note: Callable[[Call], None] = eqx.field(static=True)

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
        result = function(*args, **kwargs)
        self.note(Call(self.module, self.path, method, args, kwargs, result))
        return result


def _observed(node: Any, path: str, wanted: set[str], note: Callable[[Call], None]) -> Any:
    children, structure = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda leaf: leaf is not node
    )
    if isinstance(node, eqx.Module | tuple):
        keys = [jax.tree_util.keystr(key, simple=True, separator=".") for key, _ in children]
        node = jax.tree.unflatten(
            structure,
            [
                _observed(child, f"{path}.{key}" if path else key, wanted, note)
                for key, (_, child) in zip(keys, children, strict=True)
            ],
        )
    if path not in wanted or not isinstance(node, eqx.Module):
        return node
    wanted.remove(path)
    return _Observed(node, path, note)
