"""Modules whose calls pass through a function, and the model with such modules at given paths.

What that function does, to note a call or to change it, is in `_capture.py` and `_patch.py`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from inspect import isfunction
from typing import Any, NamedTuple

import equinox as eqx
import jax

from equigemma._typing import Array
from equigemma.interpret._pattern import attend_with
from equigemma.nn import MaskSpec


class Invocation(NamedTuple):
    """One call of one method of a module, not made yet: `function(*args, **kwargs)` makes it."""

    module: Any
    method: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class AbstractInterceptor(eqx.Module):
    """What happens around a call. Its arrays are leaves of the model that it is part of."""

    @property
    @abstractmethod
    def is_reader(self) -> bool:
        """Whether all values stay as they are."""

    @abstractmethod
    def scope(self, invocation: Invocation) -> AbstractContextManager:
        """What holds during the call."""

    @abstractmethod
    def before(self, invocation: Invocation) -> tuple[Any, ...]:
        """The arguments that the module gets."""

    @abstractmethod
    def pattern(self) -> Callable[[Array, MaskSpec], Array] | None:
        """What becomes of attention weights, where the module computes such."""

    @abstractmethod
    def after(self, invocation: Invocation, result: Any) -> Any:
        """What the caller gets."""


class Intercepted(eqx.Module):
    """A module whose calls pass through interceptors. Everything else about it is as before.

    Each gets what those before it made of arguments, attention weights and result.
    """

    module: Any
    interceptors: tuple[AbstractInterceptor, ...]

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        # To `isinstance`, and so to type checks, it is the module within.
        return type(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(Invocation(self.module, "__call__", self.module, args, kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("module", "interceptors"):
            raise AttributeError(name)
        value = getattr(self.module, name)
        if not isfunction(getattr(type(self.module), name, None)):
            return value
        return lambda *args, **kwargs: self._called(
            Invocation(self.module, name, value, args, kwargs)
        )

    def _called(self, invocation: Invocation) -> Any:
        with ExitStack() as scopes:
            for interceptor in self.interceptors:
                scopes.enter_context(interceptor.scope(invocation))
                invocation = invocation._replace(args=interceptor.before(invocation))
            result = self._result(invocation)
            for interceptor in self.interceptors:
                result = interceptor.after(invocation, result)
            return result

    def _result(self, invocation: Invocation) -> Any:
        patterns = [(i.is_reader, i.pattern()) for i in self.interceptors]
        changes = [(is_reader, change) for is_reader, change in patterns if change is not None]
        if not changes:
            return invocation.function(*invocation.args, **invocation.kwargs)
        *_, mask_spec = invocation.args

        def change(weights: Array) -> Array:
            for _, one in changes:
                weights = one(weights, mask_spec)
            return weights

        changed = attend_with(change, self.module, *invocation.args)
        # Who only reads does not have the model compute in another way.
        is_read = all(is_reader for is_reader, _ in changes)
        return self.module(*invocation.args) if is_read else changed


def intercepted(model: Any, interceptors: Mapping[str, AbstractInterceptor]) -> Any:
    """`model`, with interceptors around the modules at their paths.

    Modules that are intercepted already keep their paths; the new interceptors come last.
    """

    def around(node: Any, path: str) -> Any:
        new = (interceptors[path],) if path in interceptors else ()
        if type(node) is Intercepted:
            return Intercepted(below(node.module, path), (*node.interceptors, *new))
        return Intercepted(below(node, path), new) if new else below(node, path)

    def below(node: Any, path: str) -> Any:
        if not isinstance(node, eqx.Module | tuple):
            return node
        parts, structure = _children(node)
        return jax.tree.unflatten(
            structure, [around(child, _joined(path, key)) for key, child in parts]
        )

    return around(model, "")


def modules(model: Any) -> Iterator[tuple[str, eqx.Module]]:
    """Every module within `model` with its path, parents before their parts."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, eqx.Module]]:
        if type(node) is Intercepted:
            node = node.module
        if isinstance(node, eqx.Module):
            yield path, node
        if isinstance(node, eqx.Module | tuple):
            for key, child in _children(node)[0]:
                yield from walk(child, _joined(path, key))

    return walk(model, "")


def _children(node: Any) -> tuple[list[tuple[str, Any]], Any]:
    children, structure = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda leaf: leaf is not node
    )
    keys = [jax.tree_util.keystr(key, simple=True, separator=".") for key, _ in children]
    return list(zip(keys, (child for _, child in children), strict=True)), structure


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
