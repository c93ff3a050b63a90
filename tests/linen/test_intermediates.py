"""Captured values: DeepMind's names, and the values that the names stand for.

Their own captures are compared in `tests/interop/`, values and all. Here names and shapes are
compared with those that their package gave for the golden models, and values with what the modules
compute when called by hand.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import upstream
from stored import NAMES, flat, stored

from equigemma import linen
from equigemma.nn import apply_rope, rope_sin_cos


TOKENS = jnp.maximum(tiny.tokens(2, 5), 1)


def capture(config, wanted=True, **options):
    shim = linen.Transformer(config=config, dtype=jnp.float32)
    variables = linen.to_variables(tiny.model(config))
    return shim.apply(variables, TOKENS, capture_intermediates=wanted, **options)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_theirs(name):
    golden = stored(name)
    expected = json.loads((upstream.GOLDEN / "upstream_intermediates.json").read_text())[name]

    def run(variables):
        tokens = jnp.asarray(golden["tokens"])
        return golden.model.apply(variables, tokens, capture_intermediates=True)[1]

    state = jax.eval_shape(run, golden.variables)
    assert set(state) == {"intermediates"}
    found = flat(state["intermediates"])
    assert {key: "x".join(map(str, leaf.shape)) for key, leaf in found.items()} == expected


@pytest.mark.slow
def test_values_by_hand():
    config = tiny.GEMMA3
    model, layer = tiny.model(config), tiny.model(config).layers[0]
    output, state = capture(config)
    seen = state["intermediates"]
    first = seen["layer_0"]

    x = model.embedding.encode(TOKENS)
    normed = layer.pre_attention_norm(x)
    attention = config.layers[0].attention
    q, k, v = layer.attention.projection(normed)
    close = {"rtol": 0, "atol": 2e-5}  # other programs, the same sums in another order
    np.testing.assert_allclose(first["pre_attention_norm"]["__call__"][0], normed, **close)
    np.testing.assert_allclose(first["attn"]["q_einsum"]["__call__"][0], q, **close)
    np.testing.assert_allclose(
        first["attn"]["kv_einsum"]["__call__"][0], jnp.stack([k, v]), **close
    )
    q, k = layer.attention.query_norm(q), layer.attention.key_norm(k)
    np.testing.assert_allclose(first["attn"]["_query_norm"]["__call__"][0], q, **close)
    np.testing.assert_allclose(first["attn"]["_key_norm"]["__call__"][0], k, **close)

    rope = rope_sin_cos(jnp.broadcast_to(jnp.arange(5), (2, 5)), attention.head_dim, attention.rope)
    q, k = apply_rope(q, *rope) * attention.query_scale, apply_rope(k, *rope)
    k = jnp.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)
    logits = jnp.einsum("btnh,bsnh->btns", q, k)
    distance = jnp.arange(5)[:, None] - jnp.arange(5)[None, :]
    mask = (distance >= 0) & (distance < (attention.window or 5))
    weights = jax.nn.softmax(jnp.where(mask[None, :, None, :], logits, -jnp.inf), axis=-1)
    np.testing.assert_allclose(first["attn"]["attention_weights"]["__call__"][0], weights, **close)
    cache, update = first["attn"]["__call__"][0]
    assert cache is None
    np.testing.assert_allclose(first["attn"]["attn_vec_einsum"]["__call__"][0], update, **close)
    x = x + layer.post_attention_norm(update)
    gates, down, result = first["mlp"]["__call__"]
    normed = layer.pre_ffw_norm(x)
    np.testing.assert_allclose(gates, layer.ffw.gate(normed), **close)
    np.testing.assert_allclose(result, layer.ffw(normed), **close)
    np.testing.assert_array_equal(down, result)
    x = x + layer.post_ffw_norm(result)
    np.testing.assert_allclose(first["__call__"][0][1], x, **close)
    np.testing.assert_allclose(
        seen["final_norm"]["__call__"][0] @ model.embedding.weight.T, output.logits, **close
    )
    np.testing.assert_array_equal(seen["__call__"][0].logits, output.logits)


def test_the_output_does_not_depend_on_being_watched():
    output, _ = capture(tiny.GEMMA2)
    plain = linen.Transformer(config=tiny.GEMMA2).apply(
        linen.to_variables(tiny.model(tiny.GEMMA2)), TOKENS
    )
    np.testing.assert_allclose(output.logits, plain.logits, rtol=0, atol=2e-5)


def test_caches_are_captured_in_their_layout():
    golden = stored("gemma3")
    cache = golden.model.init_cache(batch_size=2, dtype=jnp.float32, cache_length=11)
    output, state = golden.model.apply(
        golden.variables, jnp.asarray(golden["tokens"]), cache=cache, capture_intermediates=True
    )
    for name, layer in output.cache.items():
        for place in (state["intermediates"][name], state["intermediates"][name]["attn"]):
            captured, _ = place["__call__"][0]
            assert captured.keys() == layer.keys()
            for part, value in layer.items():
                np.testing.assert_array_equal(captured[part], value)


def test_a_filter_sees_sites_and_methods():
    seen = []

    def wanted(site, method):
        seen.append((site.path, site.name, type(site.module).__name__, method))
        return site.name == "mlp" and "layer_1" in site.path

    _, state = capture(tiny.GEMMA2, wanted)
    assert set(flat(state["intermediates"])) == {"layer_1/mlp/__call__/0"}
    assert (("layer_0", "attn"), "attn", "Attention", "__call__") in seen
    assert (("embedder",), "embedder", "Embedding", "encode") in seen
    assert ((), None, "NoneType", "__call__") in seen


@pytest.mark.slow
@pytest.mark.parametrize("config", [tiny.GEMMA2, tiny.GEMMA4_MOE], ids=["dense", "experts"])
def test_the_projections_of_a_feed_forward_share_its_scope(config):
    # As in DeepMind's package, where Linen names them.
    mlp = "mlp" if config is tiny.GEMMA2 else "mlp2"
    values = {}
    for name in ("Einsum_0", "Einsum_1", mlp):
        _, state = capture(config, lambda site, method, name=name: site.name == name)
        found = flat(state["intermediates"])
        assert set(found) == {f"layer_{i}/{mlp}/__call__/0" for i in range(2)}
        values[name] = found[f"layer_0/{mlp}/__call__/0"]
    assert values["Einsum_0"].shape[-2] == 2
    np.testing.assert_array_equal(values["Einsum_1"], values[mlp])


@pytest.mark.slow
def test_experts_by_hand():
    config = tiny.GEMMA4_MOE
    model, layer = tiny.model(config), tiny.model(config).layers[0]
    _, state = capture(config)
    first = state["intermediates"]["layer_0"]
    (_, update), x = first["attn"]["__call__"][0], model.embedding.encode(TOKENS)
    x = x + layer.post_attention_norm(update)
    close = {"rtol": 0, "atol": 2e-5}  # other programs, the same sums in another order
    normed = layer.ffw.pre_experts_norm(x)
    router, experts = layer.ffw.router, layer.ffw.experts
    np.testing.assert_allclose(first["pre_ffw_norm"]["__call__"][0], normed, **close)
    np.testing.assert_allclose(first["mlp"]["router_norm"]["__call__"][0], router.norm(x), **close)
    np.testing.assert_allclose(first["mlp"]["__call__"][0], experts(normed, *router(x)), **close)
    # In DeepMind's model these are modules that return their weight.
    for name, weight in (("gating_einsum", experts.gate.weight), ("linear", experts.down.weight)):
        np.testing.assert_array_equal(first["mlp"][name]["__call__"][0], weight)


def test_keys_and_values_that_no_layer_attends_to():
    """Gemma 4 has projections in layers that share keys; DeepMind's model computes with them."""
    golden = stored("gemma4_ple_shared_kv")
    tokens = jnp.asarray(golden["tokens"])
    _, state = golden.model.apply(golden.variables, tokens, capture_intermediates=True)
    config = golden.model.config.model
    index = len(config.layers) - 1
    assert config.owner(index) != index
    layer = state["intermediates"][f"layer_{index}"]
    params = golden.variables["params"][f"layer_{index}"]
    x = np.asarray(layer["pre_attention_norm"]["__call__"][0], np.float64)
    weight = np.asarray(params["attn"]["kv_einsum"]["w"], np.float64)
    k, v = np.einsum("btd,ckdh->cbtkh", x, weight)
    close = {"rtol": 0, "atol": 1e-5}  # against float64
    np.testing.assert_allclose(layer["attn"]["kv_einsum"]["__call__"][0], [k, v], **close)
    scale = np.asarray(params["attn"]["key_norm"]["scale"], np.float64)
    for name, array, factor in (("key_norm", k, scale), ("value_norm", v, 1.0)):
        size = np.sqrt(np.square(array).mean(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(
            layer["attn"][name]["__call__"][0], array / size * factor, **close
        )
    # What it does attend to are the keys of the owner, rotated.
    owner = state["intermediates"][f"layer_{config.owner(index)}"]
    for part in ("k", "v"):
        np.testing.assert_array_equal(
            layer["attn"]["__call__"][0][0][part], owner["attn"]["__call__"][0][0][part]
        )


def test_the_embedder_is_seen_by_its_methods():
    def wanted(site, method):
        return method in ("encode", "decode")

    _, state = capture(tiny.GEMMA2, wanted)
    assert set(flat(state["intermediates"])) == {"embedder/encode/0", "embedder/decode/0"}
    _, state = capture(tiny.GEMMA2, wanted, method="embedder.encode")
    assert set(flat(state["intermediates"])) == {"embedder/encode/0"}


def test_a_method_of_several_passes_collects_them_all():
    def twice(model, tokens):
        return model(tokens).logits + model(tokens).logits

    _, state = capture(tiny.GEMMA2, method=twice)
    assert len(state["intermediates"]["__call__"]) == 2
    assert len(state["intermediates"]["layer_0"]["attn"]["q_einsum"]["__call__"]) == 2


def test_nothing_wanted_nothing_returned():
    _, state = capture(tiny.GEMMA2, lambda site, method: False)
    assert state == {}
    with pytest.raises(TypeError, match="`capture_intermediates` must be a bool or a function"):
        capture(tiny.GEMMA2, "layer_0")


@pytest.mark.slow
def test_captures_pass_through_gradients_and_vmap():
    shim = linen.Transformer(config=tiny.GEMMA2, dtype=jnp.float32)
    variables = linen.to_variables(tiny.model(tiny.GEMMA2))

    def norm(variables, tokens):
        _, state = shim.apply(variables, tokens, capture_intermediates=True)
        return jnp.square(state["intermediates"]["layer_0"]["__call__"][0][1]).mean()

    each = jax.vmap(norm, in_axes=(None, 0))(variables, TOKENS)
    np.testing.assert_allclose(each.mean(), norm(variables, TOKENS), rtol=1e-5)
    gradient = jax.grad(norm)(variables, TOKENS)
    # What comes after the first layer has no part in it.
    assert flat(gradient["params"]["layer_0"])["mlp/linear"].any()
    assert not flat(gradient["params"]["layer_1"])["mlp/linear"].any()
