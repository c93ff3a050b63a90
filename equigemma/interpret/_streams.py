"""The residual stream as a sum: what writes into it, and what reads it."""

from typing import Any

import jax.numpy as jnp

from equigemma._typing import Array, Float32
from equigemma.nn import AltUpStream, Stacked, Transformer


def check_is_sum(model: Transformer, instead: str) -> None:
    """Refuses models whose stream is no sum of what their layers add, or whose layers are stacked.

    **Arguments:**

    - `model`: any model.
    - `instead`: what the caller can use for models with parallel streams.

    **Raises:** `ValueError` for AltUp, whose streams mix in ways that are not linear, and for a
    stacked model.
    """
    if isinstance(model.layers, Stacked):
        raise ValueError(
            "The layers of this model are stacked, in one loop, so none has a site of its own: use "
            "eg.unstack(model)."
        )
    if isinstance(model.stream, AltUpStream):
        raise ValueError(
            "This model has parallel streams (AltUp), which mix in ways that are not linear: its "
            f"logits are no sum over layers. Use {instead}."
        )


def writers(model: Transformer) -> dict[str, int]:
    """Sites whose values add up to the stream, with the layer that each is in, −1 for `embed`."""
    found = {"embed": -1}
    for index in range(len(model.layers)):
        found |= {f"layers.{index}.{name}": index for name in ("attn_out", "mlp_out")}
        if part(model, index, "per_layer_gate") is not None:
            found[f"layers.{index}.per_layer_gate:output"] = index
    return found


def readers(model: Transformer) -> dict[str, tuple[int, int]]:
    """Sites at which a module reads the stream, with their layer and which step of it they are.

    A reader sees the writers of layers before its own, and within its layer those of steps before.
    """
    found = {} if model.per_layer is None else {"per_layer:input.1": (-1, 0)}
    for index in range(len(model.layers)):
        before_ffw = "ffw" if part(model, index, "pre_ffw_norm") is None else "pre_ffw_norm"
        found[f"layers.{index}.pre_attention_norm:input"] = index, 0
        found[f"layers.{index}.{before_ffw}:input"] = index, 1
        if part(model, index, "per_layer_gate") is not None:
            found[f"layers.{index}.per_layer_gate:input"] = index, 2
    found["final_norm:input"] = len(model.layers), 0
    return found


def step(writer: str) -> int:
    """Which step of its layer a writer is: attention, feed-forward, gate."""
    endings = ("attn_out", "mlp_out", "per_layer_gate:output")
    return next((number for number, end in enumerate(endings) if writer.endswith(end)), -1)


def part(model: Transformer, index: int, name: str) -> Any:
    """A part of a layer."""
    return getattr(model.layers[index], name)


def scale_between(model: Transformer, start: int, stop: int) -> Float32[Array, ""]:
    """What the skip scales of layers `start` to `stop − 1` multiply the stream with."""
    scale = jnp.ones((), jnp.float32)
    for index in range(max(start, 0), stop):
        skip = part(model, index, "skip_scale")
        scale = scale if skip is None else scale * skip[0].astype(jnp.float32)
    return scale
