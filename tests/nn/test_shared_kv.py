"""Layers that attend to the keys of another: what they hold, what they see, what moves them."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import lora
from equigemma._kernels import attention as attention_kernel
from equigemma.config import KeyIsValueConfig, OwnKVConfig, SharedKVConfig
from equigemma.nn import apply_rope
from equigemma.nn._attention import SequenceInfo
from equigemma.nn._cache import KeysValues, SharedKVCache
from equigemma.nn._rope import rope_sin_cos


LENGTH = 11


def shared(owner: int = 0, unused=None, **options):
    return tiny.newer_layer(SharedKVConfig(layer=owner, unused=unused), **options)


OWN = tiny.newer_layer(OwnKVConfig(heads=1), window=3)
CONFIG = tiny.model_config(OWN, shared(window=3))


def test_a_sharing_layer_remembers_nothing():
    cache = tiny.empty_cache(CONFIG, (2,), capacity=LENGTH)
    assert cache.layers[0].k.shape == (2, 1, 3, 6)
    assert cache.layers[1] is None
    output = tiny.run(tiny.model(CONFIG), tiny.tokens(2, LENGTH), cache=cache)
    assert output.cache.layers[1] is None
    assert output.cache.length.tolist() == [LENGTH, LENGTH]


def test_it_looks_at_its_owners_keys_as_they_are():
    layer = tiny.model(CONFIG).layers[1].attention
    positions = jnp.arange(LENGTH)
    sequence = SequenceInfo(positions, jnp.asarray(0), None)
    rope = rope_sin_cos(positions, 6, layer.config.rope)
    x, k, v = (
        tiny.normal(seed, *shape)
        for seed, shape in enumerate([(LENGTH, tiny.WIDTH), (1, LENGTH, 6), (1, LENGTH, 6)])
    )
    update, memory = layer(x, sequence, rope, SharedKVCache(None, KeysValues(k, v, positions)))
    assert memory is None

    q = layer.query_norm(layer.query(x))
    mask = np.tri(LENGTH, dtype=bool) & ~np.tri(LENGTH, k=-3, dtype=bool)
    expected = layer.output(attention_kernel(apply_rope(q, *rope), k, v, jnp.asarray(mask)))
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-5)  # float32, other fusions


def test_it_needs_an_owner():
    layer = tiny.model(CONFIG).layers[1].attention
    positions = jnp.arange(LENGTH)
    sequence = SequenceInfo(positions, jnp.asarray(0), None)
    rope = rope_sin_cos(positions, 6, layer.config.rope)
    with pytest.raises(ValueError, match="attends to the keys of an earlier one"):
        layer(tiny.normal(0, LENGTH, tiny.WIDTH), sequence, rope, None)


def test_all_layers_with_a_window_see_it_and_no_further():
    model = tiny.model(CONFIG)
    tokens = jnp.arange(LENGTH)

    def hidden_states(table_rows):
        nudged = eqx.tree_at(lambda m: m.embedding.weight, model, table_rows)
        return nudged.trunk(tokens)[0].sum(axis=-1)

    jacobian = jax.jit(jax.jacfwd(hidden_states))(model.embedding.weight)
    seen = (np.asarray(jacobian)[:, :LENGTH] != 0).any(axis=-1)
    distance = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
    # The second layer looks at keys of the first, which are made from embeddings: its window does
    # not add to that of its owner beyond what the first layer has put into the stream.
    np.testing.assert_array_equal(seen, (distance >= 0) & (distance <= 2))


def test_what_a_sharing_layer_wants_reaches_its_owner():
    model = tiny.model(CONFIG)
    # The first layer adds nothing itself, so its keys matter by way of the second alone.
    silent = eqx.tree_at(
        lambda m: m.layers[0].attention.output.weight, model, replace_fn=jnp.zeros_like
    )
    gradients = jax.jit(jax.grad(lambda m: m(tiny.tokens(LENGTH)).logits.std()))(silent)
    kv = gradients.layers[0].attention.projection.kv.weight
    assert (np.abs(np.asarray(kv)).max(axis=(1, 2, 3)) > 1e-4).all()
    assert not np.asarray(gradients.layers[0].attention.projection.q.weight).any()


@pytest.mark.parametrize(
    "stored", [OwnKVConfig(heads=1), KeyIsValueConfig(heads=1)], ids=["apart", "one"]
)
def test_unused_weights_are_carried_and_never_read(stored):
    config = replace(CONFIG, layers=(OWN, shared(window=3, unused=stored)))
    model = tiny.model(config)
    unused = model.layers[1].attention.unused
    shape = (1, tiny.WIDTH, 6)
    assert (unused.k is None, unused.kv is None) == (
        stored == OwnKVConfig(heads=1),
        stored != OwnKVConfig(heads=1),
    )
    assert {leaf.shape for leaf in jax.tree.leaves(unused)} == {
        (2, *shape) if stored == OwnKVConfig(heads=1) else shape,
        (6,),
    }
    poisoned = eqx.tree_at(
        lambda m: m.layers[1].attention.unused,
        model,
        replace_fn=lambda part: jax.tree.map(lambda leaf: leaf * jnp.nan, part),
    )
    assert np.isfinite(tiny.run(poisoned, tiny.tokens(LENGTH)).logits).all()
    # No adapter finds them either: there is nothing there for it to learn.
    paths = [path for path, _ in lora.einsums(model)]
    assert "layers.1.attention.query" in paths
    assert not [path for path in paths if "unused" in path]


def test_adapters_on_shared_layers_learn():
    model = tiny.model(CONFIG)
    adapted = lora.add(model, rank=2, key=jax.random.key(0))
    assert len(lora.einsums(adapted)) == 5 + 4  # a sharing layer has no keys and values to adapt
    gradients = eqx.filter_jit(eqx.filter_grad(lambda m: m(tiny.tokens(LENGTH)).logits.std()))(
        adapted
    )
    for path, adapter in lora.einsums(gradients):
        assert np.abs(np.asarray(adapter.up)).max() > 1e-6, path


def test_a_cache_of_another_model_is_named():
    owning = tiny.model_config(OWN, OWN)
    tokens = tiny.tokens(2, 3)
    for config, other, words in (
        (CONFIG, owning, "it holds keys for layer 1"),
        (owning, CONFIG, "it holds nothing for layer 1"),
    ):
        cache = tiny.empty_cache(other, (2,), capacity=LENGTH)
        with pytest.raises(ValueError, match=words):
            tiny.model(config)(tokens, cache=cache)


BROKEN = {
    "itself": (lambda: (OWN, shared(1, window=3)), "one of the layers before it"),
    "a later layer": (lambda: (OWN, shared(2, window=3), OWN), "one of the layers before it"),
    "a sharing layer": (
        lambda: (OWN, shared(0, window=3), shared(1, window=3)),
        "name their owner, layer 0",
    ),
    "another window": (lambda: (OWN, shared(0, window=5)), "same window; got 5 and 3"),
    "another head size": (
        lambda: (OWN, shared(0, window=3, head_dim=10)),
        "same head_dim; got 10 and 6",
    ),
    "odd heads": (
        lambda: (
            replace(OWN, attention=replace(OWN.attention, heads=4, kv=OwnKVConfig(heads=2))),
            shared(0, window=3),
        ),
        "got 2 and 3",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_owner_that_does_not_fit_is_named(name):
    layers, words = BROKEN[name]
    with pytest.raises(ValueError, match=words):
        tiny.model_config(*layers())


def test_who_owns_what():
    config = tiny.CONFIGS["gemma4 small"]
    assert [config.owner(index) for index in range(4)] == [0, 1, 0, 1]
    assert [config.kv_heads(index) for index in range(4)] == [1, 1, 1, 1]
    assert eg.variants.get("gemma4-e2b").owner(34) == 14
