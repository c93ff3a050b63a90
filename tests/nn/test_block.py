"""One layer: what is added to the stream, and which norms it passes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma.nn._attention import SequenceInfo
from equigemma.nn._rope import rope_sin_cos


LAYERS = {
    "plain": tiny.layer(heads=3, kv_heads=1),
    "post-norms": tiny.layer(heads=3, kv_heads=1, post_norm=True, qk_norm=True),
}


@pytest.fixture(params=LAYERS, scope="module")
def block(request):
    return tiny.model(tiny.model_config(LAYERS[request.param])).layers[0]


@eqx.filter_jit
def apply(block, x):
    positions = jnp.broadcast_to(jnp.arange(x.shape[-2]), x.shape[:-1])
    sequence = SequenceInfo(positions, jnp.zeros(x.shape[:-2], jnp.int32), None)
    config = block.attention.config
    return block(x, sequence, rope_sin_cos(positions, config.head_dim, config.rope))


def stream(scale: float = 1.0):
    x = np.random.default_rng(0).normal(size=(2, 7, tiny.WIDTH))
    return tiny.host(scale * x, jnp.float32)


def silence(weight):
    return tiny.host(np.zeros(weight.shape), weight.dtype)


def test_without_weights_the_stream_passes_unchanged(block):
    silent = eqx.tree_at(
        lambda block: (block.attention.output.weight, block.ffw.down.weight),
        block,
        replace_fn=silence,
    )
    y, memory = apply(silent, stream())
    np.testing.assert_array_equal(y, stream())
    assert memory is None


def test_each_half_adds_to_the_stream(block):
    both = apply(block, stream())[0]
    attention = eqx.tree_at(lambda b: b.ffw.down.weight, block, replace_fn=silence)
    ffw = eqx.tree_at(lambda b: b.attention.output.weight, block, replace_fn=silence)
    middle = apply(attention, stream())[0]
    assert np.abs(np.asarray(middle) - np.asarray(stream())).max() > 0.1
    # The feed-forward reads the stream after attention has added to it.
    np.testing.assert_allclose(apply(ffw, middle)[0], both, rtol=1e-5, atol=1e-5)


def test_updates_do_not_depend_on_the_size_of_the_stream(block):
    # Pre-norms divide it out; the factor is large, so that epsilon does not matter.
    def attention_update(scale):
        silent = eqx.tree_at(lambda b: b.ffw.down.weight, block, replace_fn=silence)
        return np.asarray(apply(silent, stream(scale))[0]) - np.asarray(stream(scale))

    # The stream of size 64 rounds what is added to it to about 4e-6.
    np.testing.assert_allclose(attention_update(64.0), attention_update(16.0), atol=3e-5)


def test_post_norms_decide_what_is_added():
    block = tiny.model(tiny.model_config(LAYERS["post-norms"])).layers[0]
    # A stored scale of −1 multiplies by nothing.
    muted = eqx.tree_at(
        lambda b: (b.post_attention_norm.scale, b.post_ffw_norm.scale),
        block,
        replace_fn=lambda scale: tiny.host(np.full(scale.shape, -1.0), scale.dtype),
    )
    np.testing.assert_array_equal(apply(muted, stream())[0], stream())
    # A fresh one lets each update in with a mean square of one, whatever the weights.
    fresh = eqx.tree_at(
        lambda b: (b.post_attention_norm.scale, b.ffw.down.weight), block, replace_fn=silence
    )
    update = np.asarray(apply(fresh, stream())[0]) - np.asarray(stream())
    np.testing.assert_allclose(np.mean(update**2, axis=-1), np.ones((2, 7)), rtol=1e-4)


def test_gradients_reach_every_weight(block):
    loss = eqx.filter_jit(jax.grad(lambda block, x: (apply(block, x)[0] ** 3).sum()))
    gradient = loss(block, stream())
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        assert np.isfinite(leaf).all() and np.any(np.asarray(leaf) != 0), jax.tree_util.keystr(path)
