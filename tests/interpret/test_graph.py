"""Attribution graphs. `parity/test_circuit_tracer.py` compares edges with another library's."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma import interpret
from equigemma.interpret import graph, sae


TOKENS = tiny.tokens(6)
N = 11


def transcoders(model, *, without_weight=False, affine=False):
    found = []
    for layer in range(len(model.layers)):
        rng = np.random.default_rng(layer)
        shapes = dict(w_enc=(tiny.WIDTH, N), w_dec=(N, tiny.WIDTH), b_enc=(N,), threshold=(N,))
        if affine:
            shapes["skip"] = (tiny.WIDTH, tiny.WIDTH)
        weights = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
        place = sae.Place(f"layers.{layer}.mlp_normed", f"layers.{layer}.mlp_out", without_weight)
        found.append((sae.JumpReLU(**weights, b_dec=jnp.zeros(tiny.WIDTH)), place))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gemma2", {}),
        ("gemma2", {"without_weight": True, "affine": True}),
        ("gemma3", {"affine": True}),
    ],
)
def test_effects_on_a_node_add_up_to_its_value(kind, options):
    """Of a linear map without a constant, which the model is with its norms and patterns frozen:
    on a logit to the logit, on a feature to what it is before its activation function and bias."""
    model = tiny.model(tiny.CONFIGS[kind])
    scopes = transcoders(model, **options)
    found = graph.attribute(model, scopes, TOKENS, skip=0, batch=5)
    total = found.adjacency.astype(np.float64).sum(axis=1)
    table = np.asarray(model.embedding.table, np.float64)
    final = np.asarray(model.trunk(TOKENS)[0][-1], np.float64)
    logits = table @ final
    expected = logits[found.logits] - logits.mean()
    np.testing.assert_allclose(total[-len(expected) :], expected, rtol=0, atol=1e-4)
    names = [place.reads for _, place in scopes]
    _, values = interpret.activations(lambda m: m(TOKENS), model, names)
    for row, (layer, position, number) in enumerate(found.features):
        scope, place = scopes[layer]
        read = sae.inputs(scope, place, model, values[place.reads])
        before = np.asarray(read[position], np.float64) @ np.asarray(scope.w_enc)[:, number]
        np.testing.assert_allclose(total[row], before, rtol=0, atol=1e-4)
    assert len(found.features) > 20


@pytest.mark.slow
def test_the_likeliest_features_alone():
    """Rows of fewer features are those of all."""
    model = tiny.model(tiny.GEMMA2)
    scopes = transcoders(model)
    whole = graph.attribute(model, scopes, TOKENS, batch=4)
    few = graph.attribute(model, scopes, TOKENS, batch=4, max_features=9)
    assert len(few.features) == 9
    place = {tuple(feature): row for row, feature in enumerate(whole.features.tolist())}
    rest = np.arange(len(whole.features), len(whole.adjacency))
    kept = np.concatenate([[place[tuple(feature)] for feature in few.features.tolist()], rest])
    np.testing.assert_allclose(few.adjacency, whole.adjacency[np.ix_(kept, kept)], atol=1e-5)


def chain():
    """Two features, an error, a token, a logit: token → 0 → 1 → logit, and the error → logit."""
    adjacency = np.zeros((5, 5), np.float32)
    adjacency[0, 3], adjacency[1, 0], adjacency[4, 1], adjacency[4, 2] = 2.0, -3.0, 9.0, 1.0
    return graph.Graph(
        tokens=np.array([7]),
        features=np.array([[0, 0, 3], [0, 0, 5]]),
        activations=np.array([1.0, 2.0], np.float32),
        logits=np.array([4]),
        probabilities=np.array([0.5], np.float32),
        layers=1,
        adjacency=adjacency,
    )


def test_pruning_by_hand():
    # Influence: 0.45 of each on the way, 0.05 of the error; all of it 1.4.
    found = graph.prune(chain(), nodes=0.9, edges=0.98)
    np.testing.assert_array_equal(found.nodes, [True, True, False, True, True])
    assert {(int(t), int(s)) for t, s in zip(*np.nonzero(found.edges))} == {(0, 3), (1, 0), (4, 1)}
    np.testing.assert_allclose(sorted(found.cumulative)[:2], [0.45 / 1.4, 0.9 / 1.4], rtol=1e-6)
    np.testing.assert_allclose(found.cumulative[2], 1.0, rtol=1e-6)
    assert graph.prune(chain(), nodes=1.0, edges=1.0).nodes.all()


def test_json_of_the_viewer():
    text = graph.to_json(
        chain(), graph.prune(chain(), nodes=0.9), ["a"], ["b"], slug="s", scan="mine"
    )
    read = json.loads(text)
    assert set(read) == {"metadata", "qParams", "nodes", "links"}
    assert [node["node_id"] for node in read["nodes"]] == ["0_3_0", "0_5_0", "E_7_0", "2_4_0"]
    assert read["nodes"][1]["feature"] == 20  # (0 + 5)(0 + 6)/2 + 5
    assert read["nodes"][3]["clerp"] == 'Output "b" (p=0.500)'
    assert {"source": "0_3_0", "target": "0_5_0", "weight": -3.0} in read["links"]


def test_a_picture():
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("agg")
    axes = graph.draw(chain(), graph.prune(chain(), nodes=0.9), ["a"])
    assert len(axes.lines) == 3
    assert len(axes.collections[0].get_offsets()) == 4


GEMMA2 = tiny.model(tiny.GEMMA2)
WRONG = {
    "too few": (
        lambda: graph.attribute(GEMMA2, transcoders(GEMMA2)[:1], TOKENS),
        "There must be a transcoder of each of the 2 layers, in order; got 1.",
    ),
    "out of order": (
        lambda: graph.attribute(GEMMA2, transcoders(GEMMA2)[::-1], TOKENS),
        "Transcoder 0 should write layers.0.mlp_out, got layers.1.mlp_out.",
    ),
    "gates": (
        lambda: graph.attribute(tiny.model(tiny.GEMMA4_SMALL), [], TOKENS),
        "This model has gates of per-layer inputs, which are not linear",
    ),
    "a share": (
        lambda: graph.prune(chain(), nodes=80),
        "`nodes` must be a share of the influence, in [0, 1]; got 80.",
    ),
    "words": (
        lambda: graph.to_json(chain(), graph.prune(chain()), [], ["b"], slug="s", scan="x"),
        "`words` must be 1 strings, got 0.",
    ),
}


@pytest.mark.parametrize(("call", "says"), WRONG.values(), ids=WRONG)
def test_the_error_says_what_to_do(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)
