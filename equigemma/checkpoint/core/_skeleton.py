"""A model's tree with shapes in place of arrays, to be filled with the weights of a file."""

from functools import lru_cache

import equinox as eqx
import jax

from equigemma.config import ModelConfig
from equigemma.nn import Transformer


# Opening a checkpoint asks several times for the same one; a large model takes a second to trace.
@lru_cache(maxsize=16)
def skeleton(config: ModelConfig) -> Transformer:
    """The `Transformer` of `config` with a `jax.ShapeDtypeStruct` for every array."""
    # A key that has no value either: making a true one compiles two programs.
    key = jax.eval_shape(jax.random.key, 0)
    return eqx.filter_eval_shape(Transformer, config, key=key)
