"""Measures of an SAE: L0, fraction of variance explained, loss recovered."""

import jax.numpy as jnp

from equigemma._typing import Array, Float, Float32, typed


@typed
def l0(features: Float[Array, "*B n"]) -> Float32[Array, ""]:
    """The mean number of active features of a token.

    **Arguments:** `features`: activations of n features for each token.

    **Returns:** a mean over all tokens.
    """
    return (features != 0).sum(axis=-1).astype(jnp.float32).mean()


@typed
def variance_explained(
    x: Float[Array, "*B d"], reconstruction: Float[Array, "*B d"]
) -> Float32[Array, ""]:
    """The fraction of the variance of `x` over tokens that the reconstruction keeps; 1 is all.

    **Arguments:**

    - `x`: what was encoded.
    - `reconstruction`: what was decoded from its features.

    **Returns:** 1 − sum of squared errors / sum of squared deviations from the mean token.
    """
    rows, again = (y.astype(jnp.float32).reshape(-1, y.shape[-1]) for y in (x, reconstruction))
    variance = jnp.square(rows - rows.mean(axis=0, keepdims=True)).sum()
    return 1 - jnp.square(rows - again).sum() / variance


def loss_recovered(loss: float, with_sae: float, ablated: float) -> float:
    """How much of the loss that comes from ablating a site the SAE there avoids; 1 is all.

    **Arguments:**

    - `loss`: that of the model.
    - `with_sae`: the loss with the reconstruction in place of the value (without the error term).
    - `ablated`: the loss with zeros, or the mean, there.

    **Returns:** (`ablated` − `with_sae`) / (`ablated` − `loss`).
    """
    return (ablated - with_sae) / (ablated - loss)
