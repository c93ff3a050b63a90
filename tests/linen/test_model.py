"""The shim as a value: what it is, what it holds, and what the samplers read from it."""

import dataclasses
import json
import pickle
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
import upstream
from hlo import as_users_compile
from stored import flat

from equigemma import linen, variants
from equigemma.config import ModelConfig


NAMES = sorted(name for name in dir(linen) if name.startswith("Gemma"))
GEMMA3 = linen.Transformer(config=tiny.GEMMA3, dtype=jnp.float32)


@cache
def trees() -> dict[str, Any]:
    """DeepMind's models: config, number of parameters, and shapes by path."""
    return json.loads((upstream.GOLDEN / "upstream_trees.json").read_text())


def test_every_text_model_of_theirs_has_its_class():
    assert set(NAMES) == {name for name in trees() if not name.endswith("_mm")}


@pytest.mark.parametrize("name", NAMES)
def test_classes(name):
    model = getattr(linen, name)()
    assert model.dtype == jnp.bfloat16
    assert model.return_last_only is None
    expected = variants.get(name.lower().replace("_", "-"))
    assert model.config.model.text_only() == expected.text_only()
    assert model.config.num_embed == trees()[name]["config"]["num_embed"]
    generation = name.removeprefix("Gemma").split("_")[0]
    assert str(model.INFO.tokenizer_version) == generation
    published = f"gs://gemma-data/checkpoints/{name.lower().replace('_', '-')}-it"
    assert model.INFO.default_ckpt == (published if generation == "2" else None)
    # To DeepMind's package, Gemma 3n has the tower of Gemma 3.
    sees = f"{name}_mm" in trees() or generation == "3n"
    assert model.config.input_config.support_images is sees
    assert model.config.input_config.num_tokens_per_image == (256 if sees else 0)
    assert model.config.input_config.special_tokens.START_OF_IMAGE == 255_999


@pytest.mark.parametrize("name", NAMES)
def test_values(name):
    model, again = getattr(linen, name)(), getattr(linen, name)()
    assert model == again and hash(model) == hash(again)
    assert model != getattr(linen, name)(dtype=jnp.float32)
    assert model != linen.Transformer(config=model.config)
    assert pickle.loads(pickle.dumps(model)) == model
    last = dataclasses.replace(model, return_last_only=True)
    assert type(last) is type(model)
    assert (last.return_last_only, last.config) == (True, model.config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.dtype = jnp.float32


def test_dtypes_are_equal_however_they_are_written():
    spellings = [jnp.bfloat16, "bfloat16", jnp.dtype("bfloat16")]
    assert len({linen.Gemma3_270M(dtype=spelling) for spelling in spellings}) == 1


def test_equal_models_share_a_compiled_program():
    traces = []

    @jax.jit(static_argnums=0)
    def run(model, variables, tokens):
        traces.append(model)
        return model.apply(variables, tokens).logits

    variables, tokens = linen.to_variables(tiny.model(tiny.GEMMA3)), tiny.tokens(2, 5)
    for _ in range(2):
        run(linen.Transformer(config=tiny.GEMMA3), variables, tokens)
    assert len(traces) == 1


def test_a_config_may_be_given_as_it_is_or_wrapped():
    assert linen.Transformer(config=linen.ShimConfig(tiny.GEMMA3)) == linen.Transformer(
        config=tiny.GEMMA3
    )
    resized: ModelConfig = dataclasses.replace(tiny.GEMMA3, vocab=53)
    assert linen.Gemma3_270M(config=resized).config.num_embed == 53


def test_the_protocols_hold_at_run_time():
    assert isinstance(GEMMA3, linen.TransformerLike)
    assert isinstance(GEMMA3.config, linen.TransformerConfig)
    assert isinstance(GEMMA3.config.input_config, linen.InputConfig)
    assert isinstance(GEMMA3.INFO, linen.ModelInfo)
    output = jax.eval_shape(
        GEMMA3.apply, linen.to_variables(tiny.model(tiny.GEMMA3)), tiny.tokens(3)
    )
    assert isinstance(output, linen.Output)
    # An Equinox model is called directly, so it is not one of these.
    assert not isinstance(tiny.model(tiny.GEMMA3), linen.TransformerLike)


def test_the_tower_that_is_missing_is_not_promised():
    for name in ("Gemma3_1B", "Gemma4_E2B"):
        with pytest.raises(ValueError, match=r"text_only=False.* encoders of images and audio"):
            getattr(linen, name)(text_only=False)
    assert linen.Gemma3_4B().config.input_config.num_tokens_per_image == 256
    assert not linen.Gemma3_4B(text_only=True).config.input_config.support_images


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma3n_E2B", "Gemma3n_E4B"])
def test_gemma_3n_has_the_tower_of_gemma_3(name):
    model = getattr(linen, name)(text_only=False)
    made = jax.eval_shape(model.init, jax.random.key(0), tiny.tokens(5))["params"]
    shapes = {path: leaf.shape for path, leaf in flat(made).items()}
    shim = linen.Gemma3_4B()
    other = jax.eval_shape(shim.init, jax.random.key(0), tiny.tokens(5))["params"]
    tower = {
        path: tuple(2048 if size == shim.config.embed_dim else size for size in leaf.shape)
        for path, leaf in flat(other).items()
        if path.startswith(("vision_encoder/", "embedder/mm_"))
    }
    text = getattr(linen, name)(text_only=True)
    without = jax.eval_shape(text.init, jax.random.key(0), tiny.tokens(5))["params"]
    assert tower and shapes == {p: leaf.shape for p, leaf in flat(without).items()} | tower
    assert text.config.model == variants.get(name.lower().replace("_", "-"))


@pytest.mark.parametrize("config", [None, "gemma3-270m", 3])
def test_a_model_needs_a_config(config):
    with pytest.raises(TypeError, match="needs a ModelConfig"):
        linen.Transformer(config=config)


def test_calling_the_unbound_model_says_what_to_do():
    with pytest.raises(TypeError, match=r"model\.apply\(variables, tokens\).*model\.bind"):
        GEMMA3(tiny.tokens(2, 5))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A key as an attribute, as in `kauldron.random.PRNGKey`."""

    rng: jax.Array


class TestInit:
    """Their tree, their shapes, their dtypes, for any tokens and any key."""

    @pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_any_batch(self, shape, dtype):
        model = linen.Transformer(config=tiny.GEMMA3, dtype=dtype)
        made = jax.eval_shape(model.init, jax.random.key(0), tiny.tokens(*shape))
        expected = flat(linen.to_variables(tiny.model(tiny.GEMMA3)))
        assert {name: leaf.shape for name, leaf in flat(made).items()} == {
            name: leaf.shape for name, leaf in expected.items()
        }
        assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(dtype)}

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "rngs",
        [
            jax.random.key(3),
            jax.random.PRNGKey(3),
            {"params": jax.random.key(3)},
            {"params": Wrapped(jax.random.key(3)), "dropout": Wrapped(jax.random.key(4))},
        ],
        ids=["typed", "raw", "by collection", "wrapped"],
    )
    def test_any_key(self, rngs):
        init = jax.jit(lambda rngs: GEMMA3.init(rngs, tiny.tokens(5)))
        made, expected = flat(init(rngs)), flat(init(jax.random.key(3)))
        assert made.keys() == expected.keys()
        assert all((made[name] == expected[name]).all() for name in expected)

    @pytest.mark.parametrize(
        "rngs", [3, {"dropout": jax.random.key(0)}, jax.random.split(jax.random.key(0))]
    )
    def test_anything_else_is_no_key(self, rngs):
        with pytest.raises(TypeError, match="`rngs` must be one random key"):
            GEMMA3.init(rngs, tiny.tokens(5))

    def test_arguments_are_checked_as_in_apply(self):
        with pytest.raises(TypeError, match="`tokens` must be int"):
            GEMMA3.init(jax.random.key(0), jnp.ones(5))
        with pytest.raises(TypeError, match="tokens"):
            GEMMA3.init(jax.random.key(0))

    def test_by_another_method(self):
        made = jax.eval_shape(
            lambda key: GEMMA3.init(key, tiny.tokens(5), method="embedder.encode"),
            jax.random.key(0),
        )
        assert set(made["params"]) == {"embedder", "final_norm", "layer_0", "layer_1"}

    @pytest.mark.slow
    def test_collections(self):
        key, tokens = jax.random.key(0), tiny.tokens(5)
        init = jax.jit(GEMMA3.init, static_argnames=("mutable", "capture_intermediates"))
        assert set(init(key, tokens)) == {"params"}
        assert set(init(key, tokens, mutable="params")) == {"params"}
        assert set(init(key, tokens, mutable="cache")) == set()
        captured = init(key, tokens, capture_intermediates=True)
        assert set(captured) == {"params", "intermediates"}
        logits = captured["intermediates"]["__call__"][0].logits
        assert logits.shape == (5, tiny.VOCAB)

    def test_with_the_output_of_a_first_pass(self):
        key, tokens = jax.random.key(3), tiny.tokens(5)
        output, variables = GEMMA3.init_with_output(key, tokens, is_training_property=True)
        made, expected = flat(variables), flat(GEMMA3.init(key, tokens, is_training_property=True))
        assert made.keys() == expected.keys()
        assert all((made[name] == expected[name]).all() for name in expected)
        assert (output.logits == GEMMA3.apply(variables, tokens).logits).all()
        assert GEMMA3.init_with_output(key, tokens, mutable=False)[1] == {}
        captured = GEMMA3.init_with_output(key, tokens, capture_intermediates=True)[1]
        assert set(captured) == {"params", "intermediates"}

    @pytest.mark.slow
    def test_nothing_is_allocated_twice(self):
        config = dataclasses.replace(
            tiny.GEMMA3, vocab=100_003, width=640, layers=variants.get("gemma3-270m").layers[:2]
        )
        shim = linen.Transformer(config=config, dtype=jnp.float32)
        lowered = jax.jit(shim.init).lower(jax.random.key(0), tiny.tokens(5))
        memory = as_users_compile(lowered).memory_analysis()
        assert memory is not None
        # Blocks of the weights' random bits, several at once: far less than the table of 256 MB.
        assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 4


def test_cache_layout():
    cache = GEMMA3.init_cache(batch_size=2, dtype=jnp.bfloat16, cache_length=7)
    attention = tiny.GEMMA3.layers[0].attention
    keys = ((2, 7, attention.kv.heads, attention.head_dim), jnp.bfloat16)
    expected = {
        "k": keys,
        "v": keys,
        "positions": ((2, 7), jnp.int32),
        "end_index": ((2,), jnp.int32),
    }
    assert list(cache) == ["layer_0", "layer_1"]
    for layer in cache.values():
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in layer.items()} == expected
        assert not any(leaf.any() for leaf in layer.values())
    through_config = GEMMA3.config.init_cache(batch_size=2, dtype=jnp.bfloat16, cache_length=7)
    assert jax.tree.structure(through_config) == jax.tree.structure(cache)


@pytest.mark.parametrize("sizes", [(0, 7), (2, 0), (2, -1)])
def test_a_cache_without_room(sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        GEMMA3.init_cache(batch_size=sizes[0], dtype=jnp.float32, cache_length=sizes[1])


def test_cache_placement():
    device = jax.devices()[0]
    everywhere = jax.sharding.SingleDeviceSharding(device)
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    sizes = {"batch_size": 2, "dtype": jnp.float32, "cache_length": 7}

    for sharding in (everywhere, rows):
        placed = GEMMA3.init_cache(**sizes, sharding=sharding)
        assert all(
            leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in flat(placed).values()
        )
    by_layer = {
        "layer_0": {"k": rows, "v": None, "positions": None, "end_index": None},
        "layer_1": lambda layer: dict.fromkeys(layer, rows),
    }
    placed = GEMMA3.init_cache(**sizes, sharding=by_layer)
    for name in ("layer_0", "layer_1"):
        assert placed[name]["k"].sharding.is_equivalent_to(rows, 4)
    with pytest.raises(TypeError, match="`sharding` must be None"):
        GEMMA3.init_cache(**sizes, sharding="rows")
