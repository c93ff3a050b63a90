"""The gradient of each row of a batch on its own, as differential privacy needs it."""

from collections.abc import Callable
from typing import Any

import jax

from equigemma._typing import Array, Float32
from equigemma.train._checks import check_loss
from equigemma.train._objective import Loss, mean_of, sums_of


def per_example_gradients(
    loss: Loss,
) -> Callable[[Any, Any], tuple[Float32[Array, " B"], Any]]:
    """A function `gradients(model, batch) -> (mean loss of each row, gradients)`.

    The gradients are those of the rows' mean losses: the tree of the model, each array with an axis
    for the rows in front. They are what `optax.contrib.differentially_private_aggregate` takes in:

    ```python
    optimizer = optax.chain(
        optax.contrib.differentially_private_aggregate(
            l2_norm_clip=1.0, noise_multiplier=1.1, key=jax.random.key(0)
        ),
        optax.adam(1e-4),
    )
    losses, gradients = train.per_example_gradients(train.next_token_loss)(model, batch)
    updates, state = optimizer.update(gradients, state, model)
    model = optax.apply_updates(model, updates)
    ```

    For the promise of privacy to hold, a row must be what one person contributed: one example each,
    not several packed into one.

    **Arguments:** `loss`: `loss(model, batch)`, as `next_token_loss`: a sum, and what to divide it
    by.

    **Returns:** `gradients`; it can be compiled.

    **Source:** Abadi et al. 2016, arXiv:1607.00133.
    """

    check_loss(loss)

    def mean(model: Any, row: Any) -> Float32[Array, ""]:
        return mean_of(sums_of(loss, model, row))

    return jax.vmap(jax.value_and_grad(mean), in_axes=(None, 0))
