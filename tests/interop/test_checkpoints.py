"""Orbax folders from and for DeepMind's own loader."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemma import gm

import equigemma as eg
from equigemma import linen
from equigemma.checkpoint import load_model


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(ours, theirs):
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[name]), err_msg=name)


def assert_same_models(ours, theirs):
    assert ours.config == theirs.config
    assert_same(ours, theirs)


@pytest.fixture(scope="module")
def model():
    return eg.load("gemma3-270m")[0]


@pytest.fixture(scope="module")
def params(model):
    return linen.to_variables(model)["params"]


def test_what_they_save_loads_here(model, params, tmp_path):
    gm.ckpts.save_params(params, tmp_path / "x", wait_until_finished=True)
    # They note no config: it follows from the shapes.
    assert_same_models(load_model(tmp_path / "x"), model)


def test_what_they_save_in_the_older_layout_loads_here(model, params, tmp_path):
    import orbax.checkpoint as ocp
    from gemma.gm.ckpts import _compat

    older = _compat.flatten_and_remap_params({"transformer": params})
    assert "transformer/layer_0/mlp/gating_einsum" in older
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "x", older)
    assert_same_models(load_model(tmp_path / "x"), model)


@pytest.mark.parametrize("format", ["orbax", "orbax-flat"])
def test_what_we_save_loads_there(format, model, params, tmp_path):
    eg.save(model, tmp_path / "x", format=format)
    assert_same(gm.ckpts.load_params(tmp_path / "x"), params)
    assert_same_models(load_model(tmp_path / "x"), model)


@pytest.mark.parametrize("name", ["Gemma2_2B", "Gemma3_270M"])
@pytest.mark.parametrize("flat_layout", [False, True], ids=["nested", "flat"])
def test_a_tiny_model_of_theirs_and_back(name, flat_layout, tmp_path):
    """Their parameters from a fresh start, by way of our folder, in float32."""
    import dataclasses

    full = getattr(gm.nn, name)(dtype=jnp.float32)
    config = dataclasses.replace(
        full.config,
        num_embed=31,
        embed_dim=28,
        hidden_dim=17,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        attention_types=full.config.attention_types[:2],
    )
    theirs = full.clone(config=config)
    tokens = jnp.arange(1, 15, dtype=jnp.int32).reshape(2, 7)  # 0 is padding
    params = theirs.init(jax.random.key(0), tokens)["params"]
    shim = linen.Transformer.from_upstream(config, dtype=jnp.float32)
    ours = linen.from_variables(shim.config, {"params": params})
    eg.save(ours, tmp_path / "x", format="orbax-flat" if flat_layout else "orbax")
    again = gm.ckpts.load_params(tmp_path / "x")
    assert_same(again, params)
    expected = theirs.apply({"params": again}, tokens).logits
    # Two layers in float32, summed in orders of their own.
    np.testing.assert_allclose(
        jax.jit(lambda tokens: ours(tokens).logits)(tokens), expected, atol=1e-4
    )
