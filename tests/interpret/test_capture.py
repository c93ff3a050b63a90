"""Watching modules: which calls are seen, what they hold, and that watching changes nothing."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import interpret, lora


MODEL = tiny.model(tiny.GEMMA3)
TOKENS = tiny.tokens(2, 5)


@eqx.filter_jit
def results(model, paths):
    output, calls = interpret.capture(lambda model: model(TOKENS), model, paths)
    return output, [(call.path, call.method, call.result) for call in calls]


def test_calls_come_in_order_with_their_results():
    paths = ("layers.1.ffw", "layers.0.attention.projection.q", "layers.1.ffw.gate", "final_norm")
    output, calls = results(MODEL, paths)
    assert [(path, method) for path, method, _ in calls] == [
        ("layers.0.attention.projection.q", "__call__"),
        ("layers.1.ffw.gate", "__call__"),
        ("layers.1.ffw", "__call__"),
        ("final_norm", "__call__"),
    ]
    by_path = {path: result for path, _, result in calls}
    heads = tiny.GEMMA3.layers[0].attention
    assert by_path[paths[1]].shape == (2, 5, heads.heads, heads.head_dim)
    np.testing.assert_array_equal(by_path["final_norm"], output.hidden_states)


def test_watching_changes_nothing():
    output, _ = results(MODEL, tuple(f"layers.{i}.attention" for i in range(2)))
    plain = tiny.run(MODEL, TOKENS)
    # The same sums, in a program that also returns what it watched.
    np.testing.assert_allclose(output.logits, plain.logits, rtol=0, atol=1e-5)


def test_a_call_holds_what_went_in():
    def run(model):
        _, (call,) = interpret.capture(lambda model: model(TOKENS), model, ["layers.1.ffw"])
        return call.args[0], call.result, call.module(call.args[0])

    entered, left, again = eqx.filter_jit(run)(MODEL)
    assert entered.shape == left.shape == (2, 5, tiny.WIDTH)
    np.testing.assert_allclose(again, left, rtol=0, atol=1e-5)  # compiled as part of one program


def test_methods_by_name_are_seen_too():
    _, calls = results(MODEL, ("embedding",))
    assert [method for _, method, _ in calls] == ["encode", "decode"]


def test_what_is_not_a_method_is_passed_on():
    def run(model):
        seen = model.layers[0].attention
        return seen.config.heads, seen.output.weight.shape

    heads = tiny.GEMMA3.layers[0].attention
    (found, shape), calls = interpret.capture(run, MODEL, ["layers.0.attention"])
    assert (found, shape) == (heads.heads, (heads.heads, heads.head_dim, tiny.WIDTH))
    assert calls == []


def test_through_vmap_and_grad():
    def stream(model, tokens):
        _, (call,) = interpret.capture(lambda model: model(tokens), model, ["layers.0"])
        return jnp.square(call.result[0]).sum()

    whole = eqx.filter_jit(eqx.filter_vmap(stream, in_axes=(None, 0)))(MODEL, TOKENS)
    each = [eqx.filter_jit(stream)(MODEL, row) for row in TOKENS]
    np.testing.assert_allclose(whole, jnp.stack(each), rtol=1e-5)
    gradient = eqx.filter_jit(eqx.filter_grad(stream))(MODEL, TOKENS[0])
    assert gradient.layers[0].ffw.down.weight.any()
    assert not gradient.layers[1].ffw.down.weight.any()


def test_taps_are_the_stream_between_modules():
    paths = ("embed", "layers.0", "layers.0.post_attention_norm", "layers.0.resid_mid")
    _, calls = results(MODEL, paths)
    assert [path for path, _, _ in calls] == [paths[0], paths[2], paths[3], paths[1]]
    entered, added, between, _ = (result for _, _, result in calls)
    # Part of another program, which may fuse the sum with the norm before it.
    np.testing.assert_allclose(between, entered + added, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", ["layers.9", "layers.0.attention.output.weight", "layer_0"])
def test_unknown_paths_are_named(path):
    with pytest.raises(ValueError, match="The model has no module at"):
        interpret.capture(lambda model: None, MODEL, [path, "final_norm"])


def test_the_model_itself_is_untouched():
    before = jax.tree.structure(MODEL)
    interpret.capture(lambda model: None, MODEL, ["layers.0"])
    assert jax.tree.structure(MODEL) == before


def test_to_type_checks_a_watched_module_is_what_it_was():
    def run(model):
        assert isinstance(model.embedding, eg.nn.AbstractEmbedding)
        assert not isinstance(model.embedding, eg.nn.AbstractEinsum)

    interpret.capture(run, MODEL, ["embedding"])


class TestInsideOfATransformation:
    """What flows there is dead once the transformation is over: it is refused, never handed out."""

    @pytest.mark.slow
    def test_the_projections_of_experts_of_a_kind_that_is_computed_in_a_loop(self):
        model = lora.add(tiny.model(tiny.GEMMA4_MOE), rank=2, kind="dora", key=jax.random.key(0))
        tokens, path = tiny.tokens(3), "layers.0.ffw.experts.gate.base"
        says = f"{path} is called inside of a loop.* like layers.0.ffw.experts.gate, or call"
        with pytest.raises(ValueError, match=says):
            interpret.capture(lambda m: m(tokens).logits, model, [path])

    def test_a_mixture_of_experts_and_its_projections(self):
        model = tiny.model(tiny.GEMMA4_MOE)
        path = "layers.0.ffw.experts"

        @eqx.filter_jit
        def run(model):
            paths = [path, f"{path}.gate"]
            _, (gate, call) = interpret.capture(lambda m: m(tiny.tokens(5)), model, paths)
            assert (gate.path, gate.method) == (f"{path}.gate", "by_expert")
            return (*gate.args, gate.result), call.args, call.result

        (rows, expert, halves), (x, chosen, weights), result = run(model)
        np.testing.assert_array_equal(expert, np.sort(np.asarray(chosen).ravel()))
        weight = np.asarray(model.layers[0].ffw.experts.gate.weight)[np.asarray(expert)]
        expected = np.einsum("rd,rcfd->rcf", rows, weight)
        np.testing.assert_allclose(halves, expected, rtol=0, atol=1e-5)  # float32
        experts = model.layers[0].ffw.experts
        np.testing.assert_allclose(
            result, eqx.filter_jit(experts)(x, chosen, weights), rtol=0, atol=1e-5
        )  # compiled as part of another program

    def test_layers_that_are_stacked(self):
        config = replace(tiny.GEMMA3, layers=tiny.GEMMA3.layers * 2)
        stacked = eg.stack(tiny.model(config))
        with pytest.raises(ValueError, match=r"called inside of a loop.*eg\.unstack\(model\)"):
            interpret.capture(lambda m: m(TOKENS), stacked, ["layers.period.0.ffw"])

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "transform",
        [
            eqx.filter_jit,
            lambda f: eqx.filter_grad(lambda m: f(m).logits.sum()),
            lambda f: eqx.filter_vmap(f, in_axes=None, axis_size=2),
            lambda f: eqx.filter_checkpoint(f),
        ],
        ids=["jit", "grad", "vmap", "checkpoint"],
    )
    def test_transformations_within_capture(self, transform):
        with pytest.raises(ValueError, match="final_norm is called inside of.* Call capture"):
            interpret.capture(lambda m: transform(lambda m: m(TOKENS))(m), MODEL, ["final_norm"])
