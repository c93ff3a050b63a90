"""Arrays of a batch on their way to the host and back, also where devices have parts of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from equigemma._typing import Array


def on_host(array: Array) -> np.ndarray:
    """All values of an array, also of one with parts on devices of other processes."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))


def split_like(tokens: Any, values: np.ndarray) -> Array:
    """`values` on the devices of `tokens` `[*B L]`, their batch axes split alike."""
    sharding = tokens.sharding if isinstance(tokens, jax.Array) else None
    if not isinstance(sharding, NamedSharding):
        return jnp.asarray(values)
    batch = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: tokens.ndim - 1]))
    return jax.make_array_from_callback(values.shape, batch, lambda index: values[index])
