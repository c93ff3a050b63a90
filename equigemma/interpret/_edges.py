"""Edges between the parts of a model: attribution of each, and patching of paths."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from equigemma._typing import Array, Float32, Shaped
from equigemma.interpret._activations import activations
from equigemma.interpret._attribution import Metric
from equigemma.interpret._capture import check_function
from equigemma.interpret._patch import patch
from equigemma.interpret._sites import find
from equigemma.interpret._steering import Shift
from equigemma.interpret._streams import check_is_sum, readers, scale_between, step, writers
from equigemma.nn import Transformer


def edge_attribution(
    metric: Metric, model: Transformer, values: Mapping[str, Shaped[Array, "*B L D"]]
) -> dict[tuple[str, str], Float32[Array, "*B L"]]:
    """Edge attribution patching: to first order, how the metric would change if one part of the
    model read another value of one part before it, all others reading what they read now.

    Parts that write are the embedding, and attention, feed-forward and per-layer gate of each
    layer; parts that read are the same, the final norm, and what makes per-layer inputs of
    embeddings. One forward and one backward pass for all edges. The edges of one writer add up to
    its `attribution`.

    ```python
    names = interpret.stream_writers(model)
    _, values = interpret.activations(lambda model: model(other), model, names)
    edges = interpret.edge_attribution(metric, model, values)
    ```

    **Arguments:**

    - `metric`: a model to a number, on the prompt to be patched.
    - `model`: a model of one residual stream.
    - `values`: by writer, from the other prompt, `[*B L D]`; edges from those that are left out are
      not computed.

    **Returns:** by writer and reader `(value − own) · ∂metric/∂read`, summed over features.

    **Raises:** `ValueError` for AltUp, for a stacked model, and for a site that is no writer.

    **Source:** Syed et al. 2023, arXiv:2310.10348.
    """
    check_is_sum(model, "attribution")
    layer_of, reads = writers(model), readers(model)
    for name in values:
        if name not in layer_of:
            raise ValueError(
                f"{name} adds nothing to the residual stream; edges begin at {', '.join(layer_of)}."
            )

    def shifted(shifts: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        def run(model: Any) -> tuple[Any, dict[str, Array]]:
            return activations(metric, model, list(values))

        return patch(run, model, {name: Shift(shift) for name, shift in shifts.items()})

    # The embedding says of which shape and dtype the stream is.
    shape = jax.eval_shape(
        lambda: activations(metric, model, ["embed"])[1]["embed"]  # pyright: ignore[reportArgumentType]
    )
    shifts = {name: jnp.zeros(shape.shape, shape.dtype) for name in reads}
    gradients, own = jax.grad(shifted, has_aux=True)(shifts)
    edges = {}
    for writer, value in values.items():
        start = layer_of[writer]
        change = jnp.asarray(value).astype(jnp.float32) - own[writer].astype(jnp.float32)
        for reader, (layer, number) in reads.items():
            if (start, step(writer)) < (layer, number):
                product = change * gradients[reader].astype(jnp.float32)
                edges[writer, reader] = product.sum(axis=-1) * scale_between(model, start, layer)
    return edges


def stream_writers(model: Transformer) -> list[str]:
    """The sites whose values add up to the residual stream, at which edges begin.

    **Arguments:** `model`: a model of one residual stream.

    **Returns:** `embed`, then `attn_out`, `mlp_out` and the output of the gate of per-layer inputs,
    if there is one, of each layer.

    **Raises:** `ValueError` for AltUp, and for a stacked model.
    """
    check_is_sum(model, "attribution")
    return list(writers(model))


def path_patch(
    function: Callable[[Any], Any],
    model: Transformer,
    changes: Mapping[str, Any],
    receivers: Sequence[str],
) -> Any:
    """Path patching: `function` of a model in which receivers see senders changed, and nothing else
    does.

    In a first run the senders are changed while attention and feed-forward of all other layers
    write what they write without the change; what the receivers see then is put there in a second
    run, whose senders are as ever.

    ```python
    _, values = interpret.activations(lambda model: model(other), model, ["layers.3.z"])
    sender = {"layers.3.z": interpret.at(values["layers.3.z"][..., 5, :][..., None, :], heads=[5])}
    interpret.path_patch(metric, model, sender, ["layers.9.q"])
    ```

    **Arguments:**

    - `function`: calls the model once, on the prompt to be patched.
    - `model`: a model of one residual stream.
    - `changes`: senders, as in `patch`.
    - `receivers`: sites, such as `layers.9.q` or `final_norm:input`. Globs are allowed.

    **Returns:** what `function` returns in the second run.

    **Raises:** `ValueError` for AltUp, for a stacked model, for a receiver before all senders, and
    as `patch`.

    **Source:** Wang et al. 2022, arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969.
    """
    check_function(function, model)
    check_is_sum(model, "patch")
    senders = [site.name for name in changes for site in find(model, name)]
    frozen = [name for name in writers(model) if not any(_leads(s, name) for s in senders)]
    _, own = activations(function, model, frozen)
    names = [site.name for receiver in receivers for site in find(model, receiver)]
    _check_order(senders, names)

    def read(model: Any) -> dict[str, Array]:
        return activations(function, model, names)[1]

    return patch(function, model, dict(patch(read, model, own | dict(changes))))


def _leads(sender: str, writer: str) -> bool:
    """Whether a change at `sender` must pass through `writer` to get anywhere, or is one there."""
    if sender == writer:
        return True
    if not sender.startswith("layers.") or not writer.startswith("layers."):
        return False
    (_, layer, name), (_, other, end) = sender.split(".", 2), writer.split(".", 2)
    if layer != other:
        return False
    in_attention = ("attn_normed", "q", "k", "v", "pattern", "z")
    in_ffw = ("mlp_normed", "mlp_post", "router")
    name, end = name.partition(":")[0], end.partition(":")[0]
    if end == "attn_out":
        return name in in_attention or name.startswith(
            ("attention", "pre_attention_norm", "post_attention_norm")
        )
    if end == "mlp_out":
        return name in in_ffw or name.startswith(("ffw", "pre_ffw_norm", "post_ffw_norm"))
    return name == "per_layer_input" or name.startswith("per_layer_gate")


def _check_order(senders: Sequence[str], receivers: Sequence[str]) -> None:
    """Refuses receivers in a layer before that of every sender, which no path leads to.

    **Raises:** `ValueError` if there is one.
    """

    def layer(name: str) -> int | None:
        return int(name.split(".")[1]) if name.startswith("layers.") else None

    numbers = [layer(sender) for sender in senders]
    first = min((number for number in numbers if number is not None), default=None)
    if first is None or any(number is None for number in numbers):
        return
    for receiver in receivers:
        number = layer(receiver)
        if number is not None and number < first:
            raise ValueError(
                f"No path leads from {', '.join(senders)} to {receiver}, which is before it."
            )
