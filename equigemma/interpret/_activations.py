"""The values at sites: what `patch` replaces, read."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import equinox as eqx

from equigemma._typing import Array
from equigemma.interpret._capture import SameTrace, called, check_function
from equigemma.interpret._intercept import AbstractInterceptor, Invocation, intercepted
from equigemma.interpret._sites import Site, find
from equigemma.nn import MaskSpec


def activations(
    function: Callable[[Any], Any], model: eqx.Module, names: Collection[str]
) -> tuple[Any, dict[str, Array]]:
    """`function(model)`, and the values at sites on the way.

    They are arrays of the trace in which this is called: within `jit`, `grad` or `vmap` call it
    inside and return what you need.

    ```python
    >>> import equigemma as eg, equinox as eqx, jax
    >>> from dataclasses import replace
    >>> from equigemma import interpret
    >>> config = eg.variants.get("gemma3-270m")
    >>> small = replace(config, vocab=1_000, layers=config.layers[:2])
    >>> model = eg.Transformer(small, key=jax.random.key(0))
    >>> @eqx.filter_jit
    ... def patterns(model, tokens):
    ...     names = ["layers.*.pattern"]
    ...     return interpret.activations(lambda model: model(tokens), model, names)[1]
    >>> read = patterns(model, jax.numpy.array([2, 818, 527]))
    >>> {name: value.shape for name, value in read.items()}
    {'layers.0.pattern': (4, 3, 3), 'layers.1.pattern': (4, 3, 3)}

    ```

    **Arguments:**

    - `function`: calls its argument, such as `lambda model: model(tokens)`.
    - `model`: a model, or any tree with modules.
    - `names`: as in `patch`; shapes are in the table of `interpret.sites`.

    **Returns:** the result, and by name of the site its value: in a model that is patched already,
    the value after that.

    **Raises:** `ValueError` for a site that the model does not have, that `function` does not reach
    or reaches several times, and for one inside of another transformation than this call;
    `TypeError` for names that are one string.
    """
    check_function(function, model)
    if isinstance(names, str):
        raise TypeError(f'`names` must be a list of str, such as ["layers.0.z"]; got {names!r}.')
    wanted = {site.name: site for name in names for site in find(model, name)}
    found = _Found(SameTrace(model))
    by_path: dict[str, list[Site]] = {}
    for site in wanted.values():
        by_path.setdefault(site.path, []).append(site)
    reading = {path: _Reading(tuple(here), found) for path, here in by_path.items()}
    result = called(function, intercepted(model, reading))
    missing = [name for name in wanted if name not in found.values]
    if missing:
        raise ValueError(
            f"The function never reached {', '.join(missing)}: call the model within it."
        )
    return result, found.values


class _Found:
    """The values so far."""

    def __init__(self, trace: SameTrace):
        self.values: dict[str, Array] = {}
        self.trace = trace

    def add(self, site: Site, value: Array) -> None:
        """Takes the value at a site.

        **Raises:** `ValueError` if there is one already.
        """
        if site.name in self.values:
            raise ValueError(
                f"{site.name} is reached several times: call the model once within the function, "
                "or use `capture`, which lists every call."
            )
        self.values[site.name] = value


class _Reading(AbstractInterceptor):
    """Calls as they are, and takes the values."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    found: _Found = eqx.field(static=True)

    @property
    def is_reader(self) -> bool:
        return True

    def scope(self, invocation: Invocation) -> AbstractContextManager:
        for site in self.sites:
            self.found.trace.check(site.path)
        return nullcontext()

    def before(self, invocation: Invocation) -> tuple[Any, ...]:
        return invocation.args

    def pattern(self) -> Callable[[Array, MaskSpec], Array] | None:
        patterns = [site for site in self.sites if site.slot == "pattern"]

        def read(weights: Array, mask_spec: MaskSpec) -> Array:
            self.found.add(patterns[0], weights)
            return weights

        return read if patterns else None

    def after(self, invocation: Invocation, result: Any) -> Any:
        if invocation.method == "__call__":
            for site in self.sites:
                if site.slot == "input":
                    self.found.add(site, invocation.args[site.index or 0])
                elif site.slot == "output":
                    self.found.add(site, result if site.index is None else result[site.index])
        return result
