"""One forward pass in DeepMind's terms: their inputs, our model, their outputs."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma import nn
from equigemma._typing import Array, Bool, Float, Int, UInt8, typed
from equigemma.checkpoint.gemma import from_params
from equigemma.config import ModelConfig
from equigemma.linen._cache import CacheDict, from_dict, to_dict
from equigemma.linen._inputs import (
    PADDING,
    check_call,
    default_mask,
    default_positions,
    last_token,
    merge_batch,
)
from equigemma.linen._sites import WHOLE, Intermediates, Wanted, sow, watch


class ShimOutput(eqx.Module):
    """The output of a forward pass. With `return_last_only`, `*B L` is `*B`.

    Logits have the dtype of the parameters, unless the model's `logits_dtype` is another: they are
    computed in float32 and rounded once. Hidden states have the dtype of the parameters.
    """

    logits: Float[Array, "*B V"]
    cache: CacheDict | None
    """The cache after the pass; None if none was given."""
    hidden_states: Float[Array, "*B D"] | None
    """What the logits are made from, after the last norm; None unless asked for."""

    def replace(self, **changes: Any) -> "ShimOutput":
        """The same output with other fields."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Options:
    """What is known before a pass: part of the key of its compiled program."""

    return_last_only: bool
    return_hidden_states: bool
    logits_dtype: jnp.dtype | None
    wanted: Wanted | None


@partial(jax.jit, static_argnums=(0, 1))
def call(
    config: ModelConfig,
    options: Options,
    params: Any,
    tokens: Any,
    images: Any,
    cache: Any,
    positions: Any,
    attention_mask: Any,
) -> tuple[ShimOutput, Intermediates]:
    """The pass, compiled, and the intermediate values that `options.wanted` selects.

    Inputs are checked while it is traced, which is once for all calls of the same shapes.
    """
    model = from_params(config, params)
    check_call(model.config, tokens, images, cache, positions, attention_mask)

    def run(model: nn.Transformer) -> ShimOutput:
        return _run(
            model,
            tokens,
            images=images,
            cache=cache,
            positions=positions,
            attention_mask=attention_mask,
            options=options,
        )

    if options.wanted is None:
        return run(model), {}
    output, sown = watch(run, model, options.wanted)
    if options.wanted(WHOLE, "__call__"):
        sow(sown, WHOLE, "__call__", output)
    return output, sown


def _with_images(
    model: nn.Transformer, tokens: Int[Array, "*B L"], images: UInt8[Array, "..."]
) -> tuple[Array, Array, Array]:
    """Tokens with those of images among them, where each of the text is there, and soft tokens."""
    assert model.vision is not None
    if images.ndim == tokens.ndim + 2:
        images = images[..., None, :, :, :]
    # Theirs is never trained; the projection to the width of the text is.
    frozen = jax.tree.map(jax.lax.stop_gradient, model.vision.tower)
    soft_tokens = eqx.tree_at(lambda model: model.vision.tower, model, frozen).encode_images(images)
    config, number = model.vision.config, images.shape[-4]
    return (
        nn.insert_image_tokens(tokens, config, number, padding=PADDING),
        nn.indices_after_insertion(tokens, config, number),
        soft_tokens,
    )


@typed
def _run(
    model: nn.Transformer,
    tokens: Int[Array, "*B L"],
    *,
    images: UInt8[Array, "..."] | None,
    cache: Any,
    positions: Int[Array, "*B L_with_images"] | None,
    attention_mask: Bool[Array, "*B L_with_images S"] | None,
    options: Options,
) -> ShimOutput:
    # Their cache has one batch axis, and all rows share its slots, so inside there is always one.
    batch = tokens.shape[:-1]
    places = soft_tokens = per_image = None
    if images is not None and model.vision is not None:
        tokens, places, soft_tokens = _with_images(model, tokens, images)
        per_image = soft_tokens.shape[-2]
    positions = default_positions(tokens) if positions is None else positions.astype(jnp.int32)
    attention_mask = default_mask(tokens, per_image) if attention_mask is None else attention_mask
    tokens, places, soft_tokens, positions, attention_mask, cache = jax.tree.map(
        partial(merge_batch, batch_rank=len(batch)),
        (tokens, places, soft_tokens, positions, attention_mask, cache),
    )
    # Intermediate values are those of all tokens.
    only_last = options.return_last_only and options.wanted is None
    last = last_token(tokens)
    x, after = model.trunk(
        tokens,
        soft_tokens=soft_tokens,
        positions=positions,
        mask=attention_mask,
        cache=None if cache is None else from_dict(model.config, cache),
        keep=last[:, None] % tokens.shape[1] if only_last else None,
    )
    if only_last:
        x = x[:, 0]
    elif options.return_last_only:
        x = x[jnp.arange(x.shape[0]), last]
    elif places is not None:
        x = jnp.take_along_axis(x, places[..., None], axis=-2)
    dtype = model.embedding.table.dtype
    output = ShimOutput(
        model.unembed(x).astype(options.logits_dtype or dtype),
        None if after is None else to_dict(model.config, after),
        x.astype(dtype) if options.return_hidden_states else None,
    )
    return jax.tree.map(lambda array: array.reshape(*batch, *array.shape[1:]), output)
