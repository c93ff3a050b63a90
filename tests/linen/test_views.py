"""Two views of one value: nothing is copied between them, and nothing in the compiled `apply`."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import tiny
from hlo import as_users_compile, operations
from stored import NAMES, flat, stored

import equigemma as eg
from equigemma import linen
from equigemma.config import FeedForwardConfig, OwnKVConfig


@pytest.mark.parametrize("config", tiny.CONFIGS.values(), ids=tiny.CONFIGS)
def test_there_and_back(config):
    model = tiny.model(config)
    variables = linen.to_variables(model)
    assert eqx.tree_equal(linen.from_variables(config, variables), model)
    assert set(variables) == {"params"}


@pytest.mark.parametrize("name", NAMES)
def test_every_buffer_is_the_same(name):
    golden = stored(name)
    model = linen.from_variables(golden.model.config, golden.variables)
    assert sorted(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model)) == sorted(
        leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(golden.variables)
    )
    again = flat(linen.to_variables(model))
    for path, leaf in flat(golden.variables).items():
        assert again[path] is leaf, path


WIDTH, HIDDEN, HEAD, VOCAB = 131, 257, 62, 509


def config(gate_axes: str, heads: int, kv_heads: int) -> eg.ModelConfig:
    """Layers whose weights are all larger than any activation of a few tokens."""
    layers = []
    for layer in eg.variants.get("gemma3-270m").layers[4:6]:
        attention = replace(
            layer.attention,
            heads=heads,
            head_dim=HEAD,
            kv=OwnKVConfig(heads=kv_heads),
            qkv_axes="CNDH" if heads == kv_heads else "NDH,CKDH",
        )
        ffw = FeedForwardConfig(hidden_dim=HIDDEN, gate_axes=gate_axes)
        layers.append(replace(layer, attention=attention, ffw=ffw))
    return eg.ModelConfig(vocab=VOCAB, width=WIDTH, layers=tuple(layers))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 5)], ids=str)
@pytest.mark.parametrize("heads", [(3, 1), (4, 2), (3, 3)], ids=["3 of 1", "4 of 2", "stacked"])
@pytest.mark.parametrize("gate_axes", ["CFD", "CDF"])
def test_no_weight_is_written_by_a_compiled_call(gate_axes, heads, rows):
    shim = linen.Transformer(config=config(gate_axes, *heads), dtype=jnp.float32)
    tokens = jax.ShapeDtypeStruct(rows, jnp.int32)
    variables = jax.eval_shape(lambda key: shim.init(key, jnp.ones(rows, int)), jax.random.key(0))
    program = as_users_compile(jax.jit(shim.apply).lower(variables, tokens))
    smallest = min(leaf.size for leaf in jax.tree.leaves(variables) if leaf.ndim > 1)
    assert smallest > 5 * max(2 * HIDDEN, VOCAB)
    written = [operation for operation in operations(program) if operation.size >= smallest]
    assert not written
