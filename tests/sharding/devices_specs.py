"""Every leaf is where its letters say, and takes the bytes that were predicted."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import equigemma as eg
from equigemma import lora, quantize, sharding, train
from equigemma.sharding import Rules
from tests._support import divisible, tiny


AUTO = (AxisType.Auto,) * 2
GEMMA3 = divisible.CONFIGS["gemma3"]


def mesh(fsdp: int = 2, tensor: int = 4):
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=AUTO)


def adapted(kind: str) -> eg.Transformer:
    model = tiny.model(GEMMA3)
    return lora.add(model, rank=4, kind=kind, key=jax.random.key(0))


def forms():
    for name, config in divisible.CONFIGS.items():
        yield name, lambda config=config: tiny.model(config)
    yield "images", lambda: tiny.model(divisible.SEEING)
    yield "lora", lambda: adapted("lora")
    yield "dora", lambda: adapted("dora")
    yield "prepared", lambda: eg.prepare(tiny.model(GEMMA3))
    yield "int8", lambda: quantize.int8(tiny.model(GEMMA3))
    yield "int8 in groups", lambda: quantize.int8(tiny.model(GEMMA3), group_size=4)
    yield "int4", lambda: quantize.int4(tiny.model(GEMMA3), group_size=4)
    yield "int8 experts", lambda: quantize.int8(tiny.model(divisible.CONFIGS["gemma4 experts"]))
    yield "cache", lambda: eg.init_cache(GEMMA3, 4, capacity=12)
    yield "int8 cache", lambda: eg.init_cache(GEMMA3, 4, capacity=12, dtype=jnp.int8)
    yield "state", lambda: train.init(tiny.model(GEMMA3), optax.adam(0.1))
    yield "batch", lambda: train.Batch(*[tiny.tokens(4, 6)] * 5)


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in forms()])
def test_every_device_holds_the_bytes_that_were_predicted(make):
    tree = make()
    placed = sharding.shard(tree, mesh())
    predicted = sharding.bytes_per_device(tree, mesh())
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(eqx.filter(placed, eqx.is_array)):
        for part in leaf.addressable_shards:
            held[part.device] += part.data.nbytes
    assert set(held.values()) == {sum(predicted.values())}
    same = jax.tree.map(lambda a, b: bool((a == b).all()), tree, placed)
    assert all(jax.tree.leaves(same))


def spec_of(tree, path: str, **options) -> P:
    found = sharding.specs(tree, mesh(), **options)
    leaves, _ = jax.tree_util.tree_flatten_with_path(found)
    named = {jax.tree_util.keystr(key, simple=True, separator="."): leaf for key, leaf in leaves}
    return named[path]


ATTENTION, FFW = "layers.0.attention", "layers.0.ffw"


@pytest.mark.parametrize(
    ("form", "path", "expected"),
    [
        ("gemma3", f"{ATTENTION}.projection.q.weight", P("tensor", "fsdp", None)),
        ("gemma3", f"{ATTENTION}.projection.kv.weight", P(None, "tensor", "fsdp", None)),
        ("gemma3", f"{ATTENTION}.output.weight", P("tensor", None, "fsdp")),
        ("gemma3", f"{FFW}.gate.weight", P(None, "tensor", "fsdp")),
        ("gemma3", f"{FFW}.down.weight", P("tensor", "fsdp")),
        ("gemma3", "embedding.weight", P("tensor", "fsdp")),
        ("gemma3", "final_norm.scale", P(None)),
        ("gemma1 mqa", f"{ATTENTION}.projection.kv.weight", P(None, None, "fsdp", None)),
        ("gemma4 small", "per_layer.weight", P("tensor", None, "fsdp")),
        ("gemma4 experts", f"{FFW}.experts.gate.weight", P(None, None, "tensor", "fsdp")),
        ("images", "vision.tower.layers.0.attention.query.bias", P("tensor", None)),
        ("lora", f"{ATTENTION}.output.down", P("tensor", None, None)),
        ("lora", f"{ATTENTION}.output.up", P(None, "fsdp")),
        ("lora", f"{ATTENTION}.output.base.weight", P("tensor", None, "fsdp")),
        ("dora", f"{ATTENTION}.output.magnitude", P("fsdp")),
        ("prepared", f"{ATTENTION}.output.matrices.0", P("fsdp", "tensor")),
        ("int8", f"{FFW}.down.matrices.0", P("fsdp", "tensor")),
        ("int8", f"{FFW}.down.scale", P("fsdp")),
        ("int8", "embedding.scale", P("tensor")),
        ("int8 in groups", f"{FFW}.down.matrices.0.scale", P("fsdp", "tensor")),
        ("int4", f"{FFW}.down.matrices.0.weight", P("fsdp", "tensor")),
        ("int8 experts", f"{FFW}.experts.gate.scale", P(None, None, "tensor")),
        ("cache", "layers.0.k", P("fsdp", "tensor", None, None)),
        ("cache", "length", P("fsdp")),
        ("int8 cache", "layers.1.v_scale", P("fsdp", "tensor", None, None)),
        ("state", f"optimizer.0.mu.{FFW}.down.weight", P("tensor", "fsdp")),
        ("state", "optimizer.0.count", P()),
        ("batch", "weights", P("fsdp", None)),
    ],
)
def test_specs(form, path, expected):
    assert spec_of(dict(forms())[form](), path) == expected


def test_stacked_layers_keep_the_axis_in_front():
    config = eg.ModelConfig(vocab=32, width=16, layers=(GEMMA3.layers[0],) * 2)
    model = eg.stack(tiny.model(config))
    assert spec_of(model, "layers.period.0.ffw.down.weight") == P(None, "tensor", "fsdp")


def test_arrays_in_no_module_are_of_a_batch():
    batch = {"tokens": tiny.tokens(4, 6), "rows": [tiny.tokens(4)]}
    assert sharding.specs(batch, mesh()) == {"tokens": P("fsdp", None), "rows": [P("fsdp")]}


def test_within_jit_an_array_is_constrained():
    @jax.jit
    def made():
        return sharding.shard(eg.init_cache(GEMMA3, 4, capacity=12), mesh())

    expected = NamedSharding(mesh(), P("fsdp", "tensor"))
    assert made().layers[0].k.sharding.is_equivalent_to(expected, 4)


def test_published_models_are_split_without_allocating():
    config = eg.variants.get("gemma4-26b-a4b")
    model = eqx.filter_eval_shape(eg.Transformer, config, key=jax.random.key(0))
    whole = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(model))
    on_each = sharding.bytes_per_device(model, AbstractMesh((8, 4), ("fsdp", "tensor")))
    # Key/value heads that 4 does not divide, and norms, are all that is not split 32 times.
    assert whole / 32 <= sum(on_each.values()) < 1.01 * whole / 32


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("fdsp", "`rules` must be one of data, fsdp, tensor, fsdp_tensor, expert; got 'fdsp'."),
        ({"n": "tensor"}, "letters of the axis legend.*got 'n'"),
        ({"N": "model"}, "The rule of 'N' names the mesh axis 'model', .* 'fsdp', 'tensor'."),
        ({"N": 3}, "The rule of 'N' must be the name of a mesh axis, or a tuple of names; got 3."),
        (3, "Rules are a mapping from letters to mesh axes.*got 3"),
        ("expert", "names the mesh axis 'expert'"),
        (
            {"K": "tensor"},
            r"layers\.0\.attention\.projection\.kv\.weight has 1 along K",
        ),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sharding.specs(tiny.model(divisible.CONFIGS["gemma1 mqa"]), mesh(), rules)


def test_bad_input():
    model = tiny.model(GEMMA3)
    with pytest.raises(TypeError, match="`mesh` must be a mesh of devices.*got 'data'"):
        sharding.shard(model, "data")
    with pytest.raises(ValueError, match="has one named 'rows'. Give rules="):
        sharding.shard(model, jax.make_mesh((8,), ("rows",)))
    wrong = eqx.tree_at(lambda m: m.embedding.weight, model, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"embedding\.weight has the axes V D, and .* \(3,\)"):
        sharding.specs(wrong, mesh())
    replicated = Rules({"K": "tensor"}, may_replicate="K")
    small = tiny.model(divisible.CONFIGS["gemma1 mqa"])
    assert spec_of(small, f"{ATTENTION}.projection.kv.weight", rules=replicated) == P(*[None] * 4)
