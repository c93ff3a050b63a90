"""Forward mode and second derivatives of losses, whose backward passes are written by hand."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import lora, train


jit = partial(jax.jit, compiler_options=tiny.QUICK)


def batch() -> train.Batch:
    rng = np.random.default_rng(1)
    texts = [train.Example(rng.integers(0, tiny.VOCAB, n), np.ones(n)) for n in (7, 4, 11, 2)]
    return next(train.pack(texts, length=11, rows=3))


def plain_loss(model, batch):
    """All logits at once, differentiated by JAX alone."""
    logits = model(batch.tokens, positions=batch.positions, mask=batch.mask()).logits
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    return -jnp.sum(chosen * batch.weights)


def derivatives(loss, model):
    """Forward along one direction, and the Hessian times it."""
    along = tiny.model(model.config, 1)

    @jit
    def both(model, along):
        _, tangent = jax.jvp(loss, (model,), (along,))
        return tangent, jax.jvp(jax.grad(loss), (model,), (along,))[1]

    tangent, product = both(model, along)
    flat = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(product)]
    return float(tangent), np.concatenate(flat)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy"), [("gemma2", None), ("gemma2", "dots"), ("gemma3", "nothing")]
)
def test_a_loss_in_forward_mode(name, policy):
    model, given = tiny.model(tiny.CONFIGS[name]), batch()
    expected = derivatives(lambda model: plain_loss(model, given), model)
    ours = derivatives(
        lambda model: train.next_token_loss(model, given, remat=policy, chunk=5)[0], model
    )
    # Float32 sums in another order.
    assert ours[0] == pytest.approx(expected[0], rel=1e-4)
    assert np.linalg.norm(ours[1] - expected[1]) < 1e-4 * np.linalg.norm(expected[1])


@pytest.mark.slow
def test_a_loss_of_stacked_layers_in_forward_mode():
    model, given = tiny.model(tiny.model_config(*tiny.GEMMA3.layers, *tiny.GEMMA3.layers)), batch()

    def tangent(model):
        def loss(model):
            return train.next_token_loss(model, given, remat="nothing")[0]

        return jax.jvp(loss, (model,), (model,))[1]

    ours, expected = jit(tangent)(eg.stack(model)), jit(tangent)(model)
    assert float(ours) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
def test_adapters_in_forward_mode_over_a_base_that_stays():
    given = batch()
    model = lora.add(tiny.model(tiny.GEMMA3), rank=2, key=jax.random.key(0))
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    adapters, base = lora.split(model)

    def loss(adapters):
        whole = eqx.combine(adapters, base)
        return train.next_token_loss(whole, given, remat="nothing", chunk=5)[0]

    # Along the gradient, where nothing cancels, so that roundings to bfloat16 stay small.
    gradient = jit(jax.grad(loss))(adapters)
    forward = jit(lambda along: jax.jvp(loss, (adapters,), (along,))[1])(gradient)
    expected = sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(gradient))
    assert float(forward) == pytest.approx(expected, rel=0.02)
