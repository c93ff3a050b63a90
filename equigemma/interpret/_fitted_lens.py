"""Lenses that are fitted to a model: tuned lens and Jacobian lens."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from equigemma._arguments import as_integer
from equigemma._typing import Array, Float, Float32, Int
from equigemma.interpret._activations import activations
from equigemma.interpret._lens import logit_lens
from equigemma.interpret._patch import patch
from equigemma.interpret._steering import Shift
from equigemma.interpret._streams import check_is_sum
from equigemma.nn import Transformer


class TunedLens(eqx.Module):
    """For every layer but the last an affine map from its output to what the last layer gives.

    A new one is the logit lens: all maps are the identity. `fit_tuned_lens` trains it.

    **Source:** Belrose et al. 2023, arXiv:2303.08112.

    Attributes:
        weight: `[J−1 D D]`; the map of layer j is `x + weight[j] @ x + bias[j]`.
        bias: `[J−1 D]`.
    """

    weight: Float[Array, "layers D D"]
    bias: Float[Array, "layers D"]

    def __init__(self, model: Transformer):
        """The logit lens of `model`, in float32.

        **Arguments:** `model`: the model that the lens is for.

        **Raises:** `ValueError` for AltUp, and for a stacked model.
        """
        check_is_sum(model, "logit_lens")
        layers, width = len(model.layers) - 1, model.config.width
        self.weight = jnp.zeros((layers, width, width), jnp.float32)
        self.bias = jnp.zeros((layers, width), jnp.float32)

    def __call__(
        self, model: Transformer, stream: Float[Array, "*B L D"], layer: int
    ) -> Float32[Array, "*B L V"]:
        """Logits of the stream after a layer.

        **Arguments:**

        - `model`: the model that the lens is for.
        - `stream`: the value at `layers.{layer}.resid_post`.
        - `layer`: number of the layer, from 0; not the last one.

        **Returns:** what the model would say next.
        """
        moved = stream.astype(jnp.float32) @ self.weight[layer].T
        moved = moved + jnp.broadcast_to(self.bias[layer], moved.shape)
        return logit_lens(model, (stream + moved).astype(stream.dtype))


def tuned_lens_loss(
    lens: TunedLens, model: Transformer, tokens: Int[Array, "B L"]
) -> Float32[Array, " layers"]:
    """How far the lens is from the model at each layer: KL(model ‖ lens) in nats, mean over tokens.

    **Arguments:**

    - `lens`: the lens.
    - `model`: the model that it is for.
    - `tokens`: texts without padding.

    **Returns:** one number for each layer but the last.
    """
    names = [f"layers.{layer}.resid_post" for layer in range(len(lens.weight))]
    output, streams = activations(lambda m: m(tokens).logits, model, names)
    expected = jax.nn.log_softmax(output)
    divergences = []
    for layer, name in enumerate(names):
        found = jax.nn.log_softmax(lens(model, streams[name], layer))
        divergences.append((jnp.exp(expected) * (expected - found)).sum(axis=-1).mean())
    return jnp.stack(divergences)


def fit_tuned_lens(
    model: Transformer,
    batches: Iterable[Int[Array, "B L"]],
    optimizer: optax.GradientTransformation,
    *,
    lens: TunedLens | None = None,
) -> tuple[TunedLens, Float32[np.ndarray, "steps layers"]]:
    """Trains a tuned lens, all layers at once; the model stays as it is.

    **Arguments:**

    - `model`: the model that the lens is for.
    - `batches`: texts without padding, of one shape so that one program serves all.
    - `optimizer`: from optax. Each layer's loss depends on its own map only, so that Adam trains
      them as if each were alone.
    - `lens`: what to start from; without it the logit lens.

    **Returns:** the lens, and `tuned_lens_loss` before each step.

    **Raises:** `ValueError` for AltUp, for a stacked model, and if there are no batches.
    """

    @eqx.filter_jit
    def update(lens: TunedLens, state: Any, model: Transformer, tokens: Array) -> Any:
        def total(lens: TunedLens) -> tuple[Array, Array]:
            losses = tuned_lens_loss(lens, model, tokens)
            return losses.sum(), losses

        gradients, losses = eqx.filter_grad(total, has_aux=True)(lens)
        updates, state = optimizer.update(gradients, state, lens)  # pyright: ignore[reportArgumentType]
        return eqx.apply_updates(lens, updates), state, losses

    fitted: TunedLens = TunedLens(model) if lens is None else lens
    state, losses = optimizer.init(fitted), []  # pyright: ignore[reportArgumentType]
    for tokens in batches:
        fitted, state, loss = update(fitted, state, model, jnp.asarray(tokens))
        losses.append(np.asarray(loss))
    if not losses:
        raise ValueError("There are no batches to fit the lens to.")
    return fitted, np.stack(losses)


class JacobianLens(eqx.Module):
    """For every layer but the last the mean Jacobian from its output to that of the last layer.

    Logits are the final norm and the unembedding of `jacobian[j] @ x`. The logit lens is the one
    whose Jacobians are the identity.

    **Source:** Gurnee et al. 2026, "Verbalizable Representations Form a Global Workspace in
    Language Models", Transformer Circuits Thread.

    Attributes:
        jacobian: `[J−1 D D]`: rows are numbers of the last layer's output.
    """

    jacobian: Float32[Array, "layers D D"]

    def __call__(
        self, model: Transformer, stream: Float[Array, "*B L D"], layer: int
    ) -> Float32[Array, "*B L V"]:
        """Logits of the stream after a layer.

        **Arguments:**

        - `model`: the model that the lens is for.
        - `stream`: the value at `layers.{layer}.resid_post`.
        - `layer`: number of the layer, from 0; not the last one.

        **Returns:** what a stream like this one makes the model say, here or later.
        """
        moved = stream.astype(self.jacobian.dtype) @ self.jacobian[layer].T
        return logit_lens(model, moved.astype(stream.dtype))


def fit_jacobian_lens(
    model: Transformer, tokens: Int[Array, "B L"], *, skip: int = 16, batch: int = 32
) -> JacobianLens:
    """The mean Jacobians of a model on some texts.

    The effect of a token's stream is summed over the tokens on which it has one, and averaged over
    tokens and texts. The last token of each text and the first ones, at which attention rests, are
    left out of both.

    **Arguments:**

    - `model`: a causal model.
    - `tokens`: texts without padding. Memory is that of a backward pass over all of them for each
      of `batch` rows; for more texts, take the mean of several lenses.
    - `skip`: how many tokens at the beginning of a text are left out.
    - `batch`: how many rows of the Jacobians are computed at once.

    **Returns:** the lens, in float32.

    **Raises:** `ValueError` for AltUp, for a stacked model, and where `skip` leaves no tokens.
    """
    check_is_sum(model, "logit_lens")
    skip, batch = as_integer("skip", skip, least=0), as_integer("batch", batch, least=1)
    length, width = tokens.shape[-1], model.config.width
    if skip >= length - 1:
        raise ValueError(
            f"Texts of {length} tokens, without the first {skip} and the last, have no tokens left:"
            " take longer ones, or a smaller `skip`."
        )
    layers = len(model.layers) - 1
    names = [f"layers.{layer}.resid_post" for layer in range(layers)]
    last = f"layers.{layers}.resid_post"
    dtype = model.dtype

    def moved(shifts: dict[str, Array]) -> Array:
        def run(model: Any) -> Array:
            return activations(lambda m: m.trunk(tokens)[0], model, [last])[1][last]

        out = patch(run, model, {name: Shift(shift) for name, shift in shifts.items()})
        return out[:, skip:-1].sum(axis=(0, 1))

    _, pullback = jax.vjp(moved, {name: jnp.zeros((*tokens.shape, width), dtype) for name in names})

    def row(cotangent: Array) -> Array:
        (gradients,) = pullback(cotangent)
        kept = [gradients[name][:, skip:-1].astype(jnp.float32) for name in names]
        return jnp.stack([gradient.mean(axis=(0, 1)) for gradient in kept])

    rows = jax.lax.map(row, jnp.eye(width, dtype=dtype), batch_size=batch)
    return JacobianLens(jnp.swapaxes(rows, 0, 1))
