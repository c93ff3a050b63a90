"""Models of chosen layers, and layers that are not those of their config."""

from dataclasses import replace

import equinox as eqx
import jax
import numpy as np
import pytest
import reference
import tiny

import equigemma as eg
from equigemma import lora, quantize, train
from equigemma.config import AttentionConfig, SharedKVConfig


LENGTH = 8

# Chosen layers, and of each where the keys come from that it looks at, None: its own.
CHOICES = {
    "gemma2": ([1, 0, 0], (None, None, None)),
    "gemma3": ([0, -1, 0, 1], (None, None, None, None)),
    "gemma3n": ([1, 0, 3, 1, 3], (None, None, 0, None, 3)),
    "gemma4 small": ([1, 0, 0, 2, 3, 2], (None, None, None, 2, 0, 2)),
    "gemma4 experts": ([1, 1, 0], (None, None, None)),
}


def by_hand(name: str) -> eg.Transformer:
    """The model of chosen layers, built from a config and filled leaf by leaf."""
    model, (chosen, owners) = tiny.model(tiny.CONFIGS[name]), CHOICES[name]

    def layer(index: int, owner: int | None):
        one = model.config.layers[index]
        if owner is None:
            return one
        return replace(one, attention=replace(one.attention, kv=SharedKVConfig(layer=owner)))

    config = replace(model.config, layers=tuple(map(layer, chosen, owners)))
    built = tiny.model(config, seed=7)
    for new, old in enumerate(chosen):
        leaves = jax.tree.leaves(model.layers[old])
        structure = jax.tree.structure(built.layers[new])
        filled = jax.tree.unflatten(structure, leaves)
        built = eqx.tree_at(lambda m, new=new: m.layers[new], built, filled)
    if model.per_layer is not None:
        weight, projection = (
            np.stack([np.asarray(part)[:, index] for index in chosen], axis=1)
            for part in (model.per_layer.weight, model.per_layer.projection.weight)
        )
        built = eqx.tree_at(
            lambda m: (m.per_layer.weight, m.per_layer.projection.weight, m.per_layer.norm),
            built,
            (
                tiny.host(weight, weight.dtype),
                tiny.host(projection, weight.dtype),
                model.per_layer.norm,
            ),
        )
    rest = lambda m: (m.embedding, m.stream, m.final_norm)  # noqa: E731
    return eqx.tree_at(rest, built, rest(model))


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(our, their)


@pytest.mark.parametrize("name", CHOICES)
def test_chosen_layers_are_those_of_a_model_built_so(name):
    expected = by_hand(name)
    model = tiny.model(tiny.CONFIGS[name]).with_layers(CHOICES[name][0])
    assert_same(model, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gemma4 small"])
def test_logits_and_cache_of_chosen_layers(name):
    expected = by_hand(name)
    model = tiny.model(tiny.CONFIGS[name]).with_layers(CHOICES[name][0])
    tokens = tiny.tokens(LENGTH)
    output = tiny.run(model, tokens)
    logits, _ = reference.forward(expected, tokens)
    # As in `test_transformer`: float32 against float64.
    np.testing.assert_allclose(output.logits, logits, rtol=2e-4, atol=2e-4)
    cache = tiny.empty_cache(model.config, capacity=LENGTH)
    cached = tiny.run_in_chunks(model, tokens, (4, 4), cache=cache)
    np.testing.assert_allclose(cached.logits, output.logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_all_layers_are_the_model(name):
    model = tiny.model(tiny.CONFIGS[name])
    assert_same(model.with_layers(np.arange(len(model.layers))), model)


def test_a_tower_stays():
    model = tiny.model(tiny.GEMMA3_SEEING).with_layers([1])
    assert model.vision is tiny.model(tiny.GEMMA3_SEEING).vision and len(model.layers) == 1
    assert model.config.layers[0].attention.mask_kind == "causal_bidirectional_images"


FORMS = {
    "prepared": eg.prepare,
    "int8": quantize.int8,
    "int4 groups": quantize.int4,
    "lora": lambda model: lora.add(model, rank=1, key=jax.random.key(0)),
    "remat": train.remat,
}


@pytest.mark.parametrize("form", ["prepared", "int8", "int4 groups", "remat"])
def test_layers_in_other_forms(form):
    model, chosen = tiny.model(tiny.GEMMA3), [1, 0, 1]
    assert_same(
        FORMS[form](model).with_layers(chosen),
        FORMS[form](model.with_layers(chosen)),
    )


def test_adapters_move_with_their_layers():
    adapted = FORMS["lora"](tiny.model(tiny.GEMMA3))
    chosen = adapted.with_layers([1, 1])
    assert_same(chosen.layers, (adapted.layers[1],) * 2)
    assert set(lora.adapters(chosen)) == set(lora.adapters(adapted))
    assert_same(lora.remove(chosen), tiny.model(tiny.GEMMA3).with_layers([1, 1]))


def test_rematerialized_layers_that_share_keys():
    model, chosen = tiny.model(tiny.GEMMA4_SMALL), [1, 0, 2]
    moved = train.remat(model).with_layers(chosen)
    assert moved.layers[2].block.attention.config.kv == SharedKVConfig(layer=1)
    assert_same(moved, train.remat(model.with_layers(chosen)))


@pytest.mark.parametrize("form", ["prepared", "int8", "int4 groups"])
def test_a_per_layer_embedding_in_another_form_is_refused(form):
    model = FORMS[form](tiny.model(tiny.GEMMA4_SMALL))
    with pytest.raises(ValueError, match="Choose layers before that"):
        model.with_layers([0, 1])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "at least one layer, got none"),
        ([0, 4], "`layers` holds 4, and the model has the layers 0 to 3"),
        ([-5], "`layers` holds -5, and the model has the layers 0 to 3"),
        ([2], r"Layer 2 shares the keys and values of layer 0, .* before it; got layers=\[2\]"),
        ([2, 0], r"Layer 2 shares .* layer 0, which must come before it; got layers=\[2, 0\]"),
        ([0, 3], r"Layer 3 shares the keys and values of layer 1, which must come before it"),
        (["0"], "`layers` must be a list"),
        (3, "`layers` must be a list; got 3"),
    ],
)
def test_choices_that_make_no_sense(layers, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny.model(tiny.GEMMA4_SMALL).with_layers(layers)


def test_stacked_layers_are_refused():
    with pytest.raises(ValueError, match="take eg.unstack"):
        eg.stack(tiny.model(tiny.GEMMA1_MQA)).with_layers([0])


def test_a_model_may_share_a_layer():
    # One step of training, which takes over buffers: the two copies are two layers from then on.
    model = tiny.model(tiny.GEMMA1_MQA).with_layers([0, 0])
    assert model.layers[0].ffw.down.weight is model.layers[1].ffw.down.weight
    gradient = jax.eval_shape(jax.grad(lambda m: m(np.arange(3)).logits.sum()), model)
    assert jax.tree.structure(gradient) == jax.tree.structure(model)


# --- layers that are not those of the config ------------------------------------------------------


def swapped(model: eg.Transformer, order=(1, 0)) -> eg.Transformer:
    layers = tuple(model.layers[index] for index in order)
    return eqx.tree_at(lambda m: m.layers, model, layers)


USES = {
    "a call": lambda model, path: model(np.arange(3)),
    "trunk": lambda model, path: model.trunk(np.arange(3)),
    "with a cache": lambda model, path: model(
        np.arange(3), cache=tiny.empty_cache(model.config, capacity=3)
    ),
    "generate": lambda model, path: eg.sampling.generate(model, [1, 2], max_new_tokens=2),
    "prepare": lambda model, path: eg.prepare(model),
    "stack": lambda model, path: eg.stack(model),
    "with_layers": lambda model, path: model.with_layers([0]),
    "remat": lambda model, path: train.remat(model)(np.arange(3)),
    "save": lambda model, path: eg.save(model, path),
    "save as it is": lambda model, path: eg.save(quantize.int8(model), path),
    "orbax": lambda model, path: eg.save(model, path, format="orbax"),
}


@pytest.mark.parametrize("use", USES)
def test_swapped_layers_are_refused(use, tmp_path):
    model = swapped(tiny.model(tiny.GEMMA3))
    with pytest.raises(ValueError, match=r"Layer 0 has rope=.*says .*with_layers\(\[\.\.\.\]\)"):
        USES[use](model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_quantised_before_they_were_swapped(tmp_path):
    model = swapped(quantize.int8(tiny.model(tiny.GEMMA3)))
    with pytest.raises(ValueError, match="Layer 0 has rope="):
        eg.save(model, tmp_path / "x")


@pytest.mark.parametrize("order", [(0,), (0, 1, 1)])
def test_another_number_of_layers_is_refused(order):
    model = swapped(tiny.model(tiny.GEMMA3), order)
    with pytest.raises(ValueError, match=f"The model has {len(order)} layers, and its config 2"):
        model(np.arange(3))


def test_stacked_layers_of_another_config():
    stacked = eg.stack(tiny.model(tiny.GEMMA1_MQA))
    wrong = eqx.tree_at(lambda m: m.layers, stacked, eg.stack(tiny.model(tiny.GEMMA1_MHA)).layers)
    with pytest.raises(ValueError, match="Layer 0 has kv=OwnKVConfig"):
        wrong(np.arange(3))
    fewer = replace(stacked.config, layers=stacked.config.layers[:1])
    model = tiny.model(fewer)
    with pytest.raises(ValueError, match="The model has 2 layers, and its config 1"):
        eqx.tree_at(lambda m: m.layers, model, stacked.layers)(np.arange(3))


def test_an_attention_of_ones_own_is_not_compared():
    class Nothing(eqx.Module):
        config: AttentionConfig = eqx.field(static=True)

        def __call__(self, x, queries, turn, cache):
            return 0 * x, cache

    model = tiny.model(tiny.GEMMA3)
    own = Nothing(model.config.layers[1].attention)
    model = eqx.tree_at(lambda m: m.layers[0].attention, model, own)
    assert jax.eval_shape(model, np.arange(3)).logits.shape == (3, tiny.VOCAB)
