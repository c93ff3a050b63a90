"""The axis legend, and the run-time check of shapes at public boundaries.

Every annotation, einsum equation, docstring and sharding rule uses these letters:

| letter | axis | letter | axis |
|---|---|---|---|
| `*B` | batch, any number of axes, also none | `H` | size of one head |
| `L` | new tokens | `F` | hidden size of the feed-forward |
| `S` | keys that can be attended to (cache slots, or `L`) | `E` | experts |
| `V` | vocabulary | `P` | width of the per-layer inputs |
| `D` | width of the model | `A` | parallel residual streams |
| `N` | query heads | `I` | images |
| `K` | key/value heads | `M` | soft tokens of an image |
| `G` | query heads per key/value head, N / K | `R` | pairs of one head that rotate, H / 2 |
| `C` | parts stored in one weight: key and value, gate and up | `J` | layers, all in one array |
| `X` | experts chosen for one token | `Q` | rank of a low-rank path |
| `O` | width of the model again, where a weight leads from D to D | `U` | modes of a router |
| `T` | width of a vision or audio encoder | `Y` `Z` | rows and columns of a patch of an image |

This file holds no model code. Checks cost trace time only under `jit`; the environment variable
`JAXTYPING_DISABLE=1` turns all of them off.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import jax.numpy as jnp
import numpy as np
from beartype import beartype as _beartype
from jaxtyping import Array as Array
from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Float16 as Float16
from jaxtyping import Float32 as Float32
from jaxtyping import Int as Int
from jaxtyping import Int8 as Int8
from jaxtyping import Integer as Integer
from jaxtyping import Key as Key
from jaxtyping import PRNGKeyArray as PRNGKeyArray
from jaxtyping import Shaped as Shaped
from jaxtyping import UInt8 as UInt8
from jaxtyping import UInt32 as UInt32
from jaxtyping import jaxtyped as _jaxtyped


ArrayLike = Array | np.ndarray
DTypeLike = jnp.dtype | type | str

_F = TypeVar("_F", bound=Callable)


def typed(function: _F) -> _F:
    """Checks dtypes and shapes at each call of `function`, under jit at trace time only.

    The check is generated at the first call: done on import, it would take most of the import.
    """
    checked: Callable | None = None

    @wraps(function)
    def call(*args: Any, **kwargs: Any):
        nonlocal checked
        if checked is None:
            checked = _jaxtyped(function, typechecker=_beartype)
        try:
            return checked(*args, **kwargs)
        except TypeError as error:
            from equigemma._type_errors import message_of

            message = message_of(error, function, args, kwargs)
            if message is None:
                raise
            raise type(error)(message) from None

    return cast(_F, call)
