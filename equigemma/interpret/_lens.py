"""Residual streams and their parts in terms of logits, and attention through several layers."""

from typing import Any

import jax
import jax.numpy as jnp

from equigemma._typing import Array, ArrayLike, Float, Float32, Int, typed
from equigemma.interpret._activations import activations
from equigemma.interpret._streams import check_is_sum, part, scale_between, writers
from equigemma.nn import RMSNorm, Transformer


@typed
def logit_lens(model: Transformer, stream: Float[Array, "..."]) -> Float32[Array, "*B L V"]:
    """The logits that the model would give if its layers ended here: final norm and unembedding.

    **Arguments:**

    - `model`: that which the stream is of.
    - `stream`: the value at a `resid_pre`, `resid_post` or, but for AltUp, `resid_mid` site:
      `[*B L D]`, with AltUp `[A *B L D]`.

    **Returns:** logits as the model makes them, soft cap included.

    **Source:** nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    return model.unembed(model.final_norm(model.stream.reduce(stream)))


def logit_attribution(
    model: Transformer, tokens: Any, targets: Int[Array, "*B L"], *, by_head: bool = False
) -> tuple[Float32[Array, "*B L"], dict[str, Float32[Array, "..."]]]:
    """How much each part of the stream adds to the logits of `targets`, with the norms frozen.

    A norm is a linear map once its statistics are those of this text. Then a logit, before the soft
    cap, is a sum over what the embedding, the attention and the feed-forward of each layer add to
    the stream (and the gate of per-layer inputs, where there is one).

    **Arguments:**

    - `model`: one of a single residual stream.
    - `tokens`: as the model takes them.
    - `targets`: for each position the token whose logit is taken apart.
    - `by_head`: attention head by head, with an axis `N` at the end.

    **Returns:** the logits before the soft cap, `[*B L]`, and the parts by name of the site, which
    add up to them.

    **Raises:** `ValueError` for AltUp, whose streams mix in ways that are not linear.

    **Source:** Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    check_is_sum(model, "logit_lens or attribution")
    added = writers(model)
    last = f"layers.{len(model.layers) - 1}.resid_post"
    names = [*added, "layers.*.z", last]
    _, values = activations(lambda m: m.trunk(tokens), model, names)

    rows = model.output_embedding.table[targets].astype(jnp.float32)
    weight = rows * factor(model.final_norm, values[last])
    parts = {}
    for name, layer in added.items():
        value = values[name]
        if by_head and name.endswith("attn_out"):
            value = _heads(model, layer, values)
        scale = scale_between(model, layer, len(model.layers))
        aligned = weight[..., None, :] if value.ndim > weight.ndim else weight
        parts[name] = (value.astype(jnp.float32) * aligned).sum(axis=-1) * scale
    return (values[last].astype(jnp.float32) * weight).sum(axis=-1), parts


def factor(norm: RMSNorm | None, x: Float[Array, "*B D"]) -> Float32[Array, "*B D"]:
    """What `norm` multiplies `x` with: a linear map, if this is kept for other inputs."""
    wide = x.astype(jnp.float32)
    if norm is None:
        return jnp.ones_like(wide)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scale = jnp.broadcast_to(jax.lax.rsqrt(mean_square + norm.config.epsilon), wide.shape)
    if norm.scale is None or norm.config.offset is None:
        return scale
    return scale * jnp.broadcast_to(norm.config.offset + norm.scale.astype(jnp.float32), wide.shape)


def _heads(model: Transformer, index: int, values: dict[str, Array]) -> Float[Array, "*B L N D"]:
    """What each head adds to the stream."""
    z = values[f"layers.{index}.z"]
    output = part(model, index, "attention").output
    only = jnp.eye(z.shape[-2], dtype=z.dtype).reshape(z.shape[-2], *[1] * (z.ndim - 2), -1, 1)
    each = jax.vmap(output, out_axes=-2)(z[None] * only)
    norm = part(model, index, "post_attention_norm")
    return each.astype(jnp.float32) * factor(norm, output(z))[..., None, :]


@typed
def attention_rollout(patterns: Float[ArrayLike, "J *B N L L"]) -> Float[Array, "*B L L"]:
    """How much the last layer's position attends to each token of the text, through all layers.

    Heads count alike, and the residual connection as much as they do together.

    **Arguments:** `patterns`: of all layers, the first in front.

    **Returns:** a share for each pair of query and key; those of a query add up to 1.

    **Source:** Abnar and Zuidema 2020, arXiv:2005.00928.
    """
    mean = jnp.asarray(patterns).mean(axis=-3)
    identity = jnp.broadcast_to(jnp.eye(mean.shape[-1], dtype=mean.dtype), mean.shape)
    rolled = identity[0]
    for layer in (mean + identity) / 2:
        rolled = layer @ rolled
    return rolled
