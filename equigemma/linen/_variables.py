"""Variables in DeepMind's layout, and the random keys that they are made from."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from equigemma import nn
from equigemma.checkpoint.gemma import from_params, to_params
from equigemma.config import ModelConfig
from equigemma.linen._config import ShimConfig


def to_variables(model: nn.Transformer) -> dict[str, Any]:
    """The arrays of an Equinox model as `{"params": ...}` in DeepMind's tree. None is copied.

    **Arguments:** `model`: any `Transformer` in the form in which it is loaded.

    **Returns:** `{"params": ...}`.
    """
    return {"params": to_params(model)}


def from_variables(
    config: ModelConfig | ShimConfig, variables: Mapping[str, Any]
) -> nn.Transformer:
    """The Equinox model around the arrays of `variables`. None is copied.

    **Arguments:**

    - `config`: that of the Equinox model, or of the Linen shim.
    - `variables`: `{"params": ...}` in DeepMind's tree.

    **Returns:** the model, in the dtypes of its parameters.

    **Raises:** `CheckpointError` that lists every missing, extra or misshaped parameter.
    """
    model = config.model if isinstance(config, ShimConfig) else config
    return from_params(model, params_of(variables))


def params_of(variables: Any) -> Mapping[str, Any]:
    """The tree at `"params"`.

    **Raises:** `TypeError` or `ValueError` if there is none.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(
            '`variables` must be a mapping like {"params": ...}, as init returns it, got a '
            f"{type(variables).__name__}."
        )
    params = variables.get("params")
    if not isinstance(params, Mapping):
        raise ValueError(
            '`variables` must hold a tree of parameters at "params", it has '
            f"{', '.join(map(str, variables)) or 'nothing'}. To pass parameters alone, write "
            '{"params": params}.'
        )
    if "params" in params:
        raise ValueError('`variables` has "params" within "params"; pass {"params": params} once.')
    return params


def params_key(rngs: Any) -> jax.Array:
    """The random key for parameters.

    **Arguments:** `rngs`: a key, typed or raw, or a mapping with one at `"params"`; in place of a
    key also an object that holds one as its attribute `rng`, like `kauldron.random.PRNGKey`.

    **Raises:** `TypeError` if there is no such key.
    """
    key = rngs.get("params") if isinstance(rngs, Mapping) else rngs
    key = getattr(key, "rng", key)
    if isinstance(key, jax.Array) and (
        (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0)
        or (key.dtype == jnp.uint32 and key.ndim == 1)
    ):
        return key
    got = f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array) else type(key).__name__
    raise TypeError(
        "`rngs` must be one random key, as jax.random.key(0) makes it, or a dict with one at "
        f'"params"; got {got}.'
    )
