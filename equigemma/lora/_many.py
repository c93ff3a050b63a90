"""Several adapters of one model, each row of a batch with its own."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from equigemma._arguments import as_ids, described
from equigemma._typing import Array, Int


def stack(adapters: Sequence[Any]) -> Any:
    """Adapters as one tree, whose arrays have an axis for them in front.

    ```python
    several = lora.stack([lora.split(model)[0] for model in models])
    frozen = lora.split(models[0])[1]

    def logits(adapter, tokens):
        return eqx.combine(adapter, frozen)(tokens).logits

    jax.vmap(logits)(lora.take(several, which), tokens)  # one of them for each row
    ```

    **Arguments:** `adapters`: halves that `split` gives, of models that `add` made alike.

    **Returns:** a tree like one of the halves, each array `[adapters ...]`.

    **Raises:** `ValueError` if there are none, or if they differ in rank, strength or place.
    """
    if not isinstance(adapters, Iterable):
        raise TypeError(
            f"`adapters` must be a list of what lora.split gives, got {described(adapters)}."
        )
    adapters = list(adapters)
    if not adapters:
        raise ValueError("There is nothing to stack: give at least one adapter.")
    first = adapters[0]
    for number, other in enumerate(adapters):
        same = jax.tree.structure(other) == jax.tree.structure(first)
        if not same or list(map(jnp.shape, jax.tree.leaves(other))) != list(
            map(jnp.shape, jax.tree.leaves(first))
        ):
            raise ValueError(
                f"Adapters are stacked only if they have the same places, kind, rank and strength; "
                f"number {number} differs from number 0."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def take(stacked: Any, which: Int[Array, "..."]) -> Any:
    """Those of the stacked adapters whose numbers are given, with the axes of `which` in front.

    Under `jit`, a number that no adapter has gives NaN.

    **Arguments:**

    - `stacked`: what `stack` returns.
    - `which`: numbers of adapters, from 0, in the order of `stack`.

    **Returns:** a tree like `stacked`, each array with the axes of `which` in place of the first.

    **Raises:** `TypeError` for what is not whole numbers; outside of `jit` `ValueError` for a
    number that no adapter has.
    """
    if not jnp.issubdtype(jnp.result_type(*jax.tree.leaves(which)), jnp.integer):
        raise TypeError(f"`which` must be numbers of adapters, got {described(which)}.")
    which = as_ids("which", which)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(stacked)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError("`stacked` must be what lora.stack gives: arrays with an axis in front.")
    ((count,),) = lengths
    wrong = (which < 0) | (which >= count)
    if not isinstance(wrong, Tracer) and wrong.any():
        raise ValueError(f"`which` must be from 0 to {count - 1}, got {which.tolist()}.")
    beyond = jnp.where(wrong, count, which)
    return jax.tree.map(lambda leaf: leaf.at[beyond].get(mode="fill"), stacked)
