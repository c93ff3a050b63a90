"""Rows in which no token can be chosen: what counts as one, and the error that names them."""

import jax.numpy as jnp
import numpy as np

from equigemma._typing import Array, Bool, Float, Int
from equigemma.sampling._on_host import on_host


class NonFiniteLogitsError(ValueError):
    """No token can be chosen: logits of a row are NaN or infinite, or all tokens are forbidden."""


def has_failed(
    logits: Float[Array, "*B V"], chosen: Int[Array, "*B"], finished: Bool[Array, "*B"]
) -> Bool[Array, "*B"]:
    """True for rows that go on without a token: the model's logits are not all below infinity and
    some of them numbers, or none was left to choose from.
    """
    return ~finished & ((chosen < 0) | ~jnp.isfinite(logits.max(axis=-1)))


def raise_failed(failed: Bool[Array, "*B"]) -> None:
    """Refuses rows that have failed.

    **Raises:** `NonFiniteLogitsError`.
    """
    found = np.argwhere(on_host(failed)).tolist()
    if not found:
        return
    rows = ", ".join(str(row[0] if len(row) == 1 else tuple(row)) for row in found[:3])
    where = f" in row {rows}{', ...' if len(found) > 3 else ''}" if found[0] else ""
    raise NonFiniteLogitsError(
        f"No token can be chosen{where}: the logits are NaN or infinite, or `sampler` forbids all "
        "tokens. Load the weights in bfloat16 or float32, and look for NaN in them with "
        "jax.tree.map(lambda x: jnp.isfinite(x).all(), model)."
    )
