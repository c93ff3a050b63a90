"""`apply` in all the ways that a Linen user writes it, against the Equinox model of the arrays."""

from types import MappingProxyType

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from stored import causal

from equigemma import linen


MODEL = tiny.model(tiny.GEMMA3)
SHIM = linen.Transformer(config=tiny.GEMMA3, dtype=jnp.float32)
VARIABLES = linen.to_variables(MODEL)
# Token 0 is padding to the shim and a token like any other to the Equinox model.
TOKENS = jnp.maximum(tiny.tokens(2, 3, 7), 1)


def same(ours, expected):
    # One program sums in another order than the other; logits are of size 10.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_any_batch_is_the_equinox_model():
    expected = tiny.run(MODEL, TOKENS)
    output = SHIM.apply(VARIABLES, TOKENS, return_hidden_states=True)
    same(output.logits, expected.logits)
    same(output.hidden_states, expected.hidden_states)
    same(SHIM.apply(VARIABLES, TOKENS[0]).logits, expected.logits[0])
    same(SHIM.apply(VARIABLES, TOKENS[1, 2]).logits, expected.logits[1, 2])


def test_the_bound_model_is_the_equinox_model():
    bound = SHIM.bind(VARIABLES)
    assert eqx.tree_equal(bound, MODEL)


@pytest.mark.slow
def test_any_cache_batch():
    cache = SHIM.init_cache(batch_size=6, dtype=jnp.float32, cache_length=11)
    options = {"attention_mask": causal(7, 11, rows=6)}
    options["positions"] = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (6, 7))
    expected = SHIM.apply(VARIABLES, TOKENS.reshape(6, 7), cache=cache, **options)
    same(expected.logits.reshape(2, 3, 7, -1), SHIM.apply(VARIABLES, TOKENS).logits)

    def unflatten(leaf):
        return leaf.reshape(2, 3, *leaf.shape[1:])

    output = SHIM.apply(VARIABLES, TOKENS, **jax.tree.map(unflatten, {"cache": cache} | options))
    assert jax.tree.map(jnp.shape, output.cache) == jax.tree.map(
        lambda leaf: (2, 3, *leaf.shape[1:]), cache
    )
    for ours, theirs in zip(
        jax.tree.leaves(output.cache), jax.tree.leaves(expected.cache), strict=True
    ):
        same(ours, unflatten(theirs))
    # One row without a batch axis.
    row = jax.tree.map(lambda leaf: leaf[0], {"cache": cache} | options)
    single = SHIM.apply(VARIABLES, TOKENS[0, 0], **row)
    same(single.logits, expected.logits[0])
    assert single.cache["layer_0"]["end_index"].shape == ()


def test_a_full_cache_starts_over():
    # As upstream does: slots are counted modulo the length, and no chunk passes the end.
    cache = SHIM.init_cache(batch_size=1, dtype=jnp.float32, cache_length=5)
    for index, slot in enumerate([0, 1, 2, 3, 4, 0, 1]):
        token = TOKENS[0, :1, index : index + 1]
        cache = SHIM.apply(
            VARIABLES,
            token,
            cache=cache,
            positions=jnp.full((1, 1), 20 + index),
            attention_mask=jnp.ones((1, 1, 5), bool),
        ).cache
        assert cache["layer_1"]["positions"][0, slot] == 20 + index
        assert cache["layer_1"]["end_index"].tolist() == [index + 1]
    chunk = SHIM.apply(
        VARIABLES,
        TOKENS[0, :1, :3],
        cache=jax.tree.map(lambda leaf: leaf + 2 if leaf.ndim == 1 else leaf, cache),
        positions=jnp.array([[30, 31, 32]]),
        attention_mask=jnp.ones((1, 3, 5), bool),
    )
    assert chunk.cache["layer_0"]["positions"].tolist() == [[25, 26, 30, 31, 32]]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_token_is_written_where_a_chunk_of_one_would_be(dtype):
    # On CPU a single token takes another way into the cache than a chunk.
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), VARIABLES)
    cache = SHIM.init_cache(batch_size=2, dtype=dtype, cache_length=7)
    for index in range(7):
        cache = SHIM.apply(
            variables,
            TOKENS[0, :2, index : index + 1],
            cache=cache,
            positions=jnp.full((2, 1), index),
            attention_mask=causal(1, 7, start=index),
        ).cache
    whole = SHIM.apply(
        variables,
        TOKENS[0, :2],
        cache=SHIM.init_cache(batch_size=2, dtype=dtype, cache_length=7),
        attention_mask=causal(7, 7),
    ).cache
    # bfloat16 keeps 8 bits, and the layers below round at other places for one token.
    atol = 2e-5 if dtype == jnp.float32 else 0.3
    for name, layer in whole.items():
        assert cache[name]["positions"].tolist() == layer["positions"].tolist()
        for part in ("k", "v"):
            ours = cache[name][part].astype(jnp.float32)
            np.testing.assert_allclose(ours, layer[part].astype(jnp.float32), atol=atol)


def test_padding_is_token_0():
    padded = TOKENS[0, :2].at[1, 4:].set(0)
    output = SHIM.apply(VARIABLES, padded)
    same(output.logits[1, :4], SHIM.apply(VARIABLES, padded[1, :4]).logits)
    last = SHIM.apply(VARIABLES, padded, return_last_only=True, return_hidden_states=True)
    assert last.logits.shape == (2, tiny.VOCAB)
    assert last.hidden_states.shape == (2, tiny.WIDTH)
    same(last.logits, jnp.stack([output.logits[0, 6], output.logits[1, 3]]))


def test_return_last_only_belongs_to_the_model_or_to_the_call():
    whole, last = SHIM, linen.Transformer(config=tiny.GEMMA3, return_last_only=True)
    expected = whole.apply(VARIABLES, TOKENS, return_last_only=True).logits
    same(last.apply(VARIABLES, TOKENS).logits, expected)
    with pytest.raises(ValueError, match="given twice"):
        last.apply(VARIABLES, TOKENS, return_last_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_logits_have_the_dtype_of_the_parameters_and_are_rounded_once(dtype):
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), VARIABLES)
    output = SHIM.apply(variables, TOKENS, return_hidden_states=True)
    assert output.logits.dtype == output.hidden_states.dtype == dtype
    assert SHIM.apply(variables, output.hidden_states, method="embedder.decode").dtype == dtype
    wide = linen.Transformer(config=tiny.GEMMA3, logits_dtype="float32")
    exact = wide.apply(variables, TOKENS, return_hidden_states=True)
    assert (exact.logits.dtype, exact.hidden_states.dtype) == (jnp.float32, dtype)
    np.testing.assert_array_equal(output.logits, exact.logits.astype(dtype))
    decoded = wide.apply(variables, exact.hidden_states, method="embedder.decode")
    assert decoded.dtype == jnp.float32


def test_an_output_with_other_fields():
    output = SHIM.apply(VARIABLES, TOKENS)
    halved = output.replace(logits=output.logits / 2)
    assert type(halved) is type(output) and halved.cache is None
    np.testing.assert_array_equal(halved.logits, output.logits / 2)


def test_what_trainers_pass_changes_nothing():
    options = {"is_training_property": True, "rngs": {"dropout": jax.random.key(0)}, "audio": None}
    output = SHIM.apply(VARIABLES, TOKENS, **options)
    np.testing.assert_array_equal(output.logits, SHIM.apply(VARIABLES, TOKENS).logits)


def test_variables_may_be_any_mapping():
    frozen = MappingProxyType({"params": VARIABLES["params"], "other": MappingProxyType({})})
    same(SHIM.apply(frozen, TOKENS).logits, SHIM.apply(VARIABLES, TOKENS).logits)
    on_host = {"params": jax.tree.map(np.asarray, VARIABLES["params"])}
    same(SHIM.apply(on_host, np.asarray(TOKENS)).logits, SHIM.apply(VARIABLES, TOKENS).logits)


class TestMethods:
    """`method` by name, or as a function."""

    def test_the_embedder(self):
        x = SHIM.apply(VARIABLES, TOKENS, method="embedder.encode")
        same(x, MODEL.embedding.encode(TOKENS))
        same(SHIM.apply(VARIABLES, x, method="embedder.decode"), MODEL.embedding.decode(x))
        same(SHIM.apply(VARIABLES, TOKENS, method=lambda m, t: m.embedder.encode(t)), x)

    @pytest.mark.parametrize(
        "method",
        [None, "__call__", linen.Transformer.__call__, linen.Gemma3_270M.__call__, SHIM.__call__],
    )
    def test_the_forward_pass(self, method):
        expected = SHIM.apply(VARIABLES, TOKENS).logits
        same(SHIM.apply(VARIABLES, TOKENS, method=method).logits, expected)
        same(SHIM.apply(VARIABLES, tokens=TOKENS, method=method).logits, expected)

    @pytest.mark.parametrize("method", ["init_cache", linen.Transformer.init_cache])
    def test_the_cache(self, method):
        sizes = {"batch_size": 2, "dtype": jnp.float32, "cache_length": 7}
        made = SHIM.apply(VARIABLES, method=method, **sizes)
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, SHIM.init_cache(**sizes))

    def test_a_function_of_the_bound_model(self):
        def perplexity(model, tokens, *, scale):
            assert model.config == SHIM.config and model.INFO == SHIM.INFO
            return scale * model(tokens, return_last_only=True).logits.max()

        expected = 2 * SHIM.apply(VARIABLES, TOKENS, return_last_only=True).logits.max()
        same(SHIM.apply(VARIABLES, TOKENS, scale=2, method=perplexity), expected)

    @pytest.mark.parametrize("method", ["encode", "embedder", "config", "", 3])
    def test_anything_else_is_refused(self, method):
        with pytest.raises(ValueError, match="`method` must be '__call__', 'init_cache'"):
            SHIM.apply(VARIABLES, TOKENS, method=method)


class Denying:
    """What Flax calls a `DenyList`, by its one field."""

    def __init__(self, deny):
        self.deny = deny


class TestMutable:
    """As Linen has it: with anything but False, the result is a pair."""

    @pytest.mark.parametrize(
        ("mutable", "collections"),
        [
            (True, {"params", "stats"}),
            ("stats", {"stats"}),
            (["stats", "absent"], {"stats"}),
            ({"params"}, {"params"}),
            (Denying("params"), {"stats"}),
            (linen.DenyList(True), set()),
            ([], set()),
        ],
    )
    def test_collections(self, mutable, collections):
        variables = VARIABLES | {"stats": {"seen": jnp.arange(3)}}
        output, updated = SHIM.apply(variables, TOKENS, mutable=mutable)  # pyright: ignore
        same(output.logits, SHIM.apply(VARIABLES, TOKENS).logits)
        assert set(updated) == collections
        assert all(updated[name] is variables[name] for name in collections)

    def test_false_is_no_pair(self):
        assert isinstance(SHIM.apply(VARIABLES, TOKENS, mutable=False), linen.Output)

    def test_no_filter(self):
        with pytest.raises(TypeError, match="`mutable` must be a bool"):
            SHIM.apply(VARIABLES, TOKENS, mutable=3)


def loss(logits):
    return jnp.square(logits).mean()


@pytest.mark.slow
def test_gradients():
    ours = jax.jit(jax.grad(lambda variables: loss(SHIM.apply(variables, TOKENS).logits)))(
        VARIABLES
    )
    expected = eqx.filter_jit(eqx.filter_grad(lambda model: loss(model(TOKENS).logits)))(MODEL)
    for name, value in linen.to_variables(expected)["params"].items():
        for ours_leaf, leaf in zip(
            jax.tree.leaves(ours["params"][name]), jax.tree.leaves(value), strict=True
        ):
            scale = jnp.abs(leaf).max()
            # Two programs for one gradient, relative to its largest entry.
            np.testing.assert_allclose(ours_leaf / scale, leaf / scale, atol=1e-4)


def test_vmap_over_rows_and_over_models():
    expected = SHIM.apply(VARIABLES, TOKENS).logits
    rows = jax.vmap(jax.vmap(lambda tokens: SHIM.apply(VARIABLES, tokens).logits))(TOKENS)
    same(rows, expected)
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), VARIABLES, VARIABLES)
    models = jax.vmap(lambda variables: SHIM.apply(variables, TOKENS[0]).logits)(several)
    same(models, jnp.stack([expected[0]] * 2))


def test_vmap_over_rows_of_different_length():
    # Under vmap each row has an `end_index` of its own.
    cache = SHIM.init_cache(batch_size=2, dtype=jnp.float32, cache_length=7)
    cache = jax.tree.map(lambda leaf: leaf.at[1].set(3) if leaf.ndim == 1 else leaf, cache)
    output = jax.vmap(
        lambda token, cache, position, mask: SHIM.apply(
            VARIABLES, token, cache=cache, positions=position, attention_mask=mask
        )
    )(TOKENS[0, :2, :1], cache, jnp.array([[4], [9]]), jnp.ones((2, 1, 7), bool))
    assert output.cache["layer_0"]["positions"].tolist() == [
        [4, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 9, 0, 0, 0],
    ]


@pytest.mark.slow
def test_optax_trains_the_parameters():
    optimizer = optax.adam(1e-2)

    def error(params):
        logits = SHIM.apply({"params": params}, TOKENS[:, :, :-1]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, :, 1:]).mean()

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(error)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    params, errors = VARIABLES["params"], []
    # Adam counts its steps in int32 and multiplies by floats.
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        for _ in range(20):
            params, state, value = step(params, state)
            errors.append(float(value))
    # Thirty-six targets, thousands of parameters: it learns them by heart.
    assert errors[-1] < 0.3 * errors[0]
