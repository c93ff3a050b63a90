"""Edges and paths, against finite differences in float64 and a forward pass by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma import interpret


TOKENS, OTHER = tiny.tokens(2, 5), tiny.tokens(2, 5, seed=3)
KINDS = ["gemma1 mqa", "gemma2", "gemma4 small", "gemma4 experts"]


def wide(kind):
    return jax.tree.map(lambda w: w.astype(jnp.float64), tiny.model(tiny.CONFIGS[kind]))


def metric(model):
    return jnp.sin(model.trunk(TOKENS)[0]).sum()


def values_of(model):
    names = interpret.stream_writers(model)
    return interpret.activations(lambda m: m(OTHER), model, names)[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_a_part_add_up_to_its_attribution(kind):
    with jax.enable_x64(True):
        model = wide(kind)
        values = values_of(model)
        edges = interpret.edge_attribution(metric, model, values)
        scores = interpret.attribution(metric, model, values)
        for name, score in scores.items():
            total = sum(edge for (writer, _), edge in edges.items() if writer == name)
            # Edges are float32.
            np.testing.assert_allclose(total, score.sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "writer", "reader"),
    [
        ("gemma2", "layers.0.attn_out", "layers.0.pre_ffw_norm:input"),
        ("gemma2", "embed", "layers.1.pre_attention_norm:input"),
        ("gemma2", "layers.0.mlp_out", "final_norm:input"),
        ("gemma4 small", "layers.0.mlp_out", "layers.1.per_layer_gate:input"),
        ("gemma4 small", "embed", "per_layer:input.1"),
        ("gemma4 experts", "layers.0.attn_out", "layers.1.ffw:input"),
    ],
)
def test_an_edge_is_a_derivative(kind, writer, reader):
    with jax.enable_x64(True):
        model = wide(kind)
        values = values_of(model)
        own = interpret.activations(lambda m: m(TOKENS), model, [writer])[1][writer]
        edges = interpret.edge_attribution(metric, model, values)
        scale = 1.0
        if writer != "embed" and not reader.startswith("layers.0."):
            skip = model.layers[0].skip_scale
            scale = 1.0 if skip is None else float(skip[0])
        step = scale * (values[writer] - own)

        def at(size):
            return interpret.patch(metric, model, {reader: lambda x: x + size * step})

        found = np.asarray(edges[writer, reader], np.float64).sum()
        np.testing.assert_allclose(found, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-4)


def test_no_edge_leads_back():
    model = tiny.model(tiny.GEMMA2)
    edges = interpret.edge_attribution(metric, model, values_of(model))
    assert ("layers.0.mlp_out", "layers.0.pre_ffw_norm:input") not in edges
    assert ("layers.1.attn_out", "layers.0.pre_ffw_norm:input") not in edges
    assert len(edges) == 5 + 4 + 3 + 2 + 1  # of the embedding, then of each part after it


def test_a_path_by_hand():
    """From the first attention to the last feed-forward, and to nothing else."""
    model = tiny.model(tiny.GEMMA2)
    names = [*interpret.stream_writers(model), "layers.1.resid_mid"]
    _, own = interpret.activations(lambda m: m(TOKENS), model, names)
    changed = tiny.normal(5, *own["embed"].shape)
    block = model.layers[1]
    seen = own["layers.1.resid_mid"] + changed - own["layers.0.attn_out"]
    out = block.post_ffw_norm(block.ffw(block.pre_ffw_norm(seen)))
    expected = model.unembed(model.final_norm(own["layers.1.resid_mid"] + out))
    sender = {"layers.0.attn_out": changed}
    logits = lambda m: m(TOKENS).logits  # noqa: E731
    found = interpret.path_patch(logits, model, sender, ["layers.1.mlp_normed"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - interpret.patch(logits, model, sender)).max() > 1e-3
    assert np.abs(found - logits(model)).max() > 1e-3


def test_a_path_from_a_head_to_the_logits_is_its_direct_effect():
    model = tiny.model(tiny.GEMMA2)
    logits = lambda m: m(TOKENS).logits  # noqa: E731
    names = ["layers.0.attn_out", "layers.1.resid_post"]
    _, own = interpret.activations(logits, model, names)
    sender = {"layers.0.z": interpret.at(0.0, heads=[2])}

    def read(m):
        return interpret.activations(logits, m, names[:1])[1][names[0]]

    step = interpret.patch(read, model, sender) - own[names[0]]
    expected = model.unembed(model.final_norm(own[names[1]] + step))
    found = interpret.path_patch(logits, model, sender, ["final_norm:input"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


WRONG = {
    "no writer": (
        lambda m: interpret.edge_attribution(metric, m, {"layers.0.z": jnp.zeros(3)}),
        "layers.0.z adds nothing to the residual stream; edges begin at embed, layers.0.attn_out",
    ),
    "backwards": (
        lambda m: interpret.path_patch(metric, m, {"layers.1.z": 0.0}, ["layers.0.q"]),
        "No path leads from layers.1.z to layers.0.q, which is before it.",
    ),
}


@pytest.mark.parametrize(("call", "says"), WRONG.values(), ids=WRONG)
def test_the_error_says_what_to_do(call, says):
    with pytest.raises(ValueError) as error:
        call(tiny.model(tiny.GEMMA2))
    assert says in str(error.value)


def test_parallel_streams_have_no_edges():
    with pytest.raises(ValueError, match="parallel streams .* Use attribution"):
        interpret.stream_writers(tiny.model(tiny.GEMMA3N))
