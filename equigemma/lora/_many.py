"""Several adapters of one model, each row of a batch with its own."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

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

    **Raises:** `ValueError` if there are none, or if they differ in rank, strength or place.
    """
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
    """Those of the stacked adapters whose numbers are given, with the axes of `which` in front."""
    return jax.tree.map(lambda leaf: leaf[which], stacked)
