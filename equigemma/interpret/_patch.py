"""Run a model in which chosen values are replaced: activation patching, ablation, steering."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import equinox as eqx

from equigemma._arguments import described
from equigemma._typing import Array
from equigemma.interpret._capture import called, check_function
from equigemma.interpret._change import At, Tokens, as_at, changed, check_change
from equigemma.interpret._intercept import AbstractInterceptor, Invocation, intercepted, modules
from equigemma.interpret._sites import Site, find
from equigemma.nn import (
    AbstractBlock,
    AbstractKVCache,
    Inputs,
    MaskSpec,
    SequenceInfo,
    SharedKVCache,
)


def patch(function: Callable[[Any], Any], model: eqx.Module, changes: Mapping[str, Any]) -> Any:
    """`function` of a model in which the values at some sites are others.

    Where nothing is changed, every bit is as before (compiled: as long as the same operations are
    fused, else up to rounding). `function` may compile, differentiate or
    vectorise what it does, and may generate text: a change at a position is the same with a cache
    and without. Changes that are arrays are inputs of compiled programs, which serve other arrays
    of the same shape too.

    ```python
    >>> import equigemma as eg, jax
    >>> from dataclasses import replace
    >>> from equigemma import interpret
    >>> config = eg.variants.get("gemma3-270m")
    >>> small = replace(config, vocab=1_000, layers=config.layers[:2])
    >>> model = eg.Transformer(small, key=jax.random.key(0))
    >>> tokens = jax.numpy.array([2, 818, 527])
    >>> changes = {
    ...     "layers.0.z": interpret.at(0.0, heads=[1]),
    ...     "layers.*.mlp_out": interpret.at(lambda x: 2 * x, positions=[2]),
    ... }
    >>> interpret.patch(lambda model: model(tokens).logits, model, changes).shape
    (3, 1000)

    ```

    **Arguments:**

    - `function`: calls its argument, such as `lambda model: model(tokens).logits`.
    - `model`: a model, or any tree with modules; it stays as it is.
    - `changes`: what replaces the value at a site, or a function of the value, or `at` of either.
      Sites are named as in `interpret.sites`, by paths of modules, or by globs of either. Those of
      one site apply in order.

    **Returns:** what `function` returns.

    **Raises:** `ValueError` for a site that the model does not have or `function` does not reach,
    for values of a wrong shape, and for positions outside of the text; `TypeError` for arguments of
    a wrong kind.
    """
    check_function(function, model)
    if not isinstance(changes, Mapping):
        raise TypeError(
            '`changes` must be a dict from sites to changes, such as {"layers.0.mlp_out": 0.0}; '
            f"got {described(changes)}."
        )
    edits = [
        Edit(site, check_change(as_at(change), site))
        for name, change in changes.items()
        for site in find(model, name)
    ]
    run = _Run(tuple(edit.site.name for edit in edits))
    result = called(function, intercepted(model, _interceptors(model, edits, run)))
    run.finish()
    return result


class Edit(eqx.Module):
    """A change at a site."""

    site: Site = eqx.field(static=True)
    change: At

    def __call__(self, x: Array, tokens: Tokens | None) -> Array:
        return changed(self.change, x, self.site, tokens)


class _Run:
    """One call of `patch`: the sites that were reached, and the tokens that a layer is at work on.

    All runs with the same sites are equal, so that JAX takes a program which it compiled in an
    earlier one. It then runs no Python of this one, but compares the two: what the earlier one has
    reached, this one has.
    """

    def __init__(self, names: tuple[str, ...]):
        self.tokens: Tokens | None = None
        self._names = names
        self._reached: set[str] = set()
        self._is_over = False

    def __hash__(self) -> int:
        return hash(self._names)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Run) or self._names != other._names:
            return False
        for one, another in ((self, other), (other, self)):
            if not one._is_over:
                one._reached |= another._reached
        return True

    def reach(self, site: Site) -> None:
        """Notes that the value at a site was changed."""
        self._reached.add(site.name)

    def finish(self) -> None:
        """Refuses changes that changed nothing.

        **Raises:** `ValueError`.
        """
        self._is_over = True
        unused = [name for name in dict.fromkeys(self._names) if name not in self._reached]
        if unused:
            raise ValueError(
                f"The function never reached {', '.join(unused)}, so nothing was changed there: "
                "call the model within it, and let generators run to their end in it."
            )


def _interceptors(
    model: eqx.Module, edits: Iterable[Edit], run: _Run
) -> dict[str, AbstractInterceptor]:
    """Those of the modules that have a site, and of the layers that say which tokens there are."""
    by_path: dict[str, list[Edit]] = {}
    for edit in edits:
        by_path.setdefault(edit.site.path, []).append(edit)
    for path, node in modules(model):
        if isinstance(node, AbstractBlock):
            by_path.setdefault(path, [])
    return {path: _Patching(tuple(here), run) for path, here in by_path.items()}


class _Patching(AbstractInterceptor):
    """Calls a module with other inputs, and returns another output."""

    edits: tuple[Edit, ...]
    run: _Run = eqx.field(static=True)

    @property
    def is_reader(self) -> bool:
        return False

    @contextmanager
    def scope(self, invocation: Invocation) -> Iterator[None]:
        before = self.run.tokens
        self.run.tokens = _tokens(invocation.args, before)
        try:
            yield
        finally:
            self.run.tokens = before

    def before(self, invocation: Invocation) -> tuple[Any, ...]:
        args = invocation.args
        for edit in self._at("input", invocation):
            args = self._changed(edit, args)
        return args

    def pattern(self) -> Callable[[Array, MaskSpec], Array] | None:
        edits = [edit for edit in self.edits if edit.site.slot == "pattern"]

        def change(weights: Array, mask_spec: MaskSpec) -> Array:
            outer = self.run.tokens or Tokens(mask_spec.q_pos)
            tokens = outer._replace(positions=mask_spec.q_pos, keys=mask_spec.k_pos)
            for edit in edits:
                self.run.reach(edit.site)
                weights = edit(weights, tokens)
            return weights

        return change if edits else None

    def after(self, invocation: Invocation, result: Any) -> Any:
        for edit in self._at("output", invocation):
            result = self._changed(edit, result)
        return result

    def _at(self, slot: str, invocation: Invocation) -> list[Edit]:
        if invocation.method != "__call__":
            return []
        return [edit for edit in self.edits if edit.site.slot == slot]

    def _changed(self, edit: Edit, value: Any) -> Any:
        """A value, or one of several."""
        index = edit.site.index
        if index is None:
            self.run.reach(edit.site)
            return edit(value, self.run.tokens)
        if index >= len(value):
            raise ValueError(
                f"{edit.site.name} is one of {len(value)} values; the last one is number "
                f"{len(value) - 1}."
            )
        if value[index] is None:
            return value
        self.run.reach(edit.site)
        new = edit(value[index], self.run.tokens)
        return (*value[:index], new, *value[index + 1 :])


def _tokens(args: tuple[Any, ...], outer: Tokens | None) -> Tokens | None:
    """Which tokens a call is of: its own arguments say so, or those of the layer around it."""
    for arg in args:
        if isinstance(arg, Inputs):
            return _described(arg.sequence, arg.cache is None)
        if isinstance(arg, SequenceInfo):
            caches = [cache for cache in args if isinstance(cache, AbstractKVCache)]
            return _described(arg, not any(map(_remembers, caches)))
    return outer


def _remembers(cache: Any) -> bool:
    return not isinstance(cache, SharedKVCache) or cache.own is not None


def _described(sequence: SequenceInfo, complete: bool) -> Tokens:
    in_order = complete and sequence.contiguous and sequence.segment_ids is None
    length = sequence.positions.shape[-1] if in_order else None
    return Tokens(sequence.positions, complete=complete, length=length)
