"""The same model with its repeating layers as one loop, which compiles in the time of one period.

A plain model is a tuple of layers, each written out in the program. One of 62 layers is ten times
five local and one global layer, and two more: as a loop it is a program of eight.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import typed
from equigemma.nn import AbstractBlock, Stacked, Transformer, check_layers


@typed
def stack(model: Transformer) -> Transformer:
    """`model` with the layers of its period stacked: for training many layers.

    Logits and gradients are those of `model`. Without a cache the layers are a loop, compiled once
    for all. With one, as in `generate`, they are written out, as those of `model`: no stacked cache
    is copied at each step, and on CPU decoding reads the weights within the stack, at the speed of
    `model`; reading a prompt copies the weights of each layer before it multiplies.

    Weights are copied, once: a step of training keeps the stacked form. Do what concerns single
    layers before: adapters, 8 bits, `prepare`. Stacking twice changes nothing. `train.remat` works
    on the result too.

    ```python
    >>> import equigemma as eg, jax
    >>> from dataclasses import replace
    >>> config = eg.variants.get("gemma3-270m")
    >>> ffw = eg.config.FeedForwardConfig(hidden_dim=3)
    >>> layers = tuple(replace(layer, ffw=ffw) for layer in config.layers)
    >>> model = eg.Transformer(
    ...     replace(config, vocab=7, width=5, layers=layers), key=jax.random.key(0)
    ... )
    >>> stacked = eg.stack(model)
    >>> len(stacked.layers.period), stacked.layers.period[5].pre_attention_norm.scale.shape
    (6, (3, 5))

    ```

    **Arguments:** `model`: one whose layers repeat, also prepared, quantized or with adapters.

    **Returns:** a model whose `layers` are a `Stacked`.

    **Raises:** `ValueError` if the layers do not repeat, or depend on one another: where later ones
    attend to the keys of earlier ones, or each has an embedding of its own.
    """
    layers, config = model.layers, model.config
    if isinstance(layers, Stacked):
        return model
    check_layers(layers, config)
    if config.per_layer is not None or any(
        config.owner(index) != index for index in range(len(layers))
    ):
        raise ValueError(
            "These layers cannot be stacked: some attend to the keys of earlier ones, or have an "
            "embedding of their own. Use the model as it is."
        )
    length = _period(model)
    repeats = len(layers) // length
    groups = [layers[start : start + length] for start in range(0, repeats * length, length)]
    period = jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups)
    return eqx.tree_at(lambda m: m.layers, model, Stacked(period, layers[repeats * length :]))


@typed
def unstack(model: Transformer) -> Transformer:
    """The inverse of `stack`: a model with a tuple of layers again.

    **Arguments:** `model`: any `Transformer`; one that is not stacked is returned as it is.

    **Returns:** the model with a tuple of layers; stacked weights are copied.
    """
    layers = model.layers
    if not isinstance(layers, Stacked):
        return model
    repeats = len(jax.tree.leaves(layers.period)[0])
    groups = [jax.tree.map(lambda leaf: leaf[at], layers.period) for at in range(repeats)]
    plain = (*(block for group in groups for block in group), *layers.rest)
    return eqx.tree_at(lambda m: m.layers, model, plain)


def _period(model: Transformer) -> int:
    """After how many layers they repeat, at least twice."""
    kinds = [
        (config, *_form(layer))
        for config, layer in zip(model.config.layers, model.layers, strict=True)
    ]
    for length in range(1, len(kinds) // 2 + 1):
        if kinds[length:] == kinds[:-length]:
            return length
    raise ValueError(
        f"The {len(kinds)} layers of this model do not repeat, so there is nothing to stack. Use "
        "the model as it is."
    )


def _form(layer: AbstractBlock) -> tuple:
    leaves, structure = jax.tree.flatten(layer)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
