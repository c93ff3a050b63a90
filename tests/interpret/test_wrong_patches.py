"""Wrong calls of what reads and patches: one sentence that names the site and says what to do."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import interpret


MODEL, TOKENS = tiny.model(tiny.GEMMA3), tiny.tokens(2, 5)
ALTUP, SHARED, EXPERTS = map(tiny.model, (tiny.GEMMA3N, tiny.GEMMA4_SMALL, tiny.GEMMA4_MOE))
at = interpret.at


def patch(changes, model=MODEL, transform=lambda f: f):
    return transform(lambda m: interpret.patch(lambda m: m(TOKENS).logits, m, changes))(model)


def leaked():
    inside = []
    jax.jit(lambda x: inside.append(x + 1))(jnp.ones(tiny.WIDTH))
    return inside[0]


CALLS = {
    "no such site": (
        lambda: patch({"layers.0.mlp_ouT": 0.0}),
        "The model has no site layers.0.mlp_ouT. Is it layers.0.mlp_out? `interpret.sites(model)`",
    ),
    "no such layer": (lambda: patch({"layers.9.z": 0.0}), "The model has no site layers.9.z."),
    "a glob of nothing": (lambda: patch({"layers.*.zz": 0.0}), "The model has no site layers.*.zz"),
    "a number for a site": (
        lambda: patch({3: 0.0}),
        "A site is named by a str such as 'layers.3.z'",
    ),
    "neither in nor out": (
        lambda: patch({"layers.0.ffw:middle": 0.0}),
        "layers.0.ffw:middle: after the colon comes input or output, such as layers.0.ffw:output",
    ),
    "one of several": (
        lambda: patch({"layers.0.attention.projection:output.3": 0.0}),
        "layers.0.attention.projection:output.3 is one of 3 values; the last one is number 2.",
    ),
    "no dict": (lambda: patch([0.0]), "`changes` must be a dict from sites to changes"),
    "text for a change": (
        lambda: patch({"layers.0.z": "x"}),
        "A change must be an array of numbers, a function of one, or `at(...)` of either; got 'x'.",
    ),
    "never reached": (
        lambda: interpret.patch(lambda m: m.layers[0].ffw(jnp.ones(13)), MODEL, {"*.1.z": 0.0}),
        "The function never reached layers.1.z, so nothing was changed there",
    ),
    "keys of another layer": (
        lambda: patch({"layers.2.k": 0.0}, SHARED),
        "layer 2 has no keys and values of its own. It attends to those of layer 0: use layers",
    ),
    "within experts": (
        lambda: patch({"layers.0.ffw.experts.down": 0.0}, EXPERTS),
        "runs in a loop over experts, which it has no single input or output in: patch "
        "layers.0.ffw.experts:input or",
    ),
    "stacked": (
        lambda: patch(
            {"layers.0.z": 0.0},
            eg.stack(tiny.model(replace(tiny.GEMMA3, layers=tiny.GEMMA3.layers * 2))),
        ),
        "are stacked, in one loop, so none has a site of its own: use eg.unstack(model).",
    ),
    "which stream": (
        lambda: patch({"layers.0.resid_pre": 0.0}, ALTUP),
        "layers.0.resid_pre has 3 parallel streams: say which one to change with at(..., stream=0)",
    ),
    "no streams": (
        lambda: patch({"layers.0.resid_pre": at(0.0, stream=0)}),
        "layers.0.resid_pre is a single stream: leave out stream=0.",
    ),
    "too wide": (
        lambda: patch({"layers.0.mlp_out": np.zeros(7)}),
        "layers.0.mlp_out: the axis of features of the new value has 7 entries, and 13 are to be",
    ),
    "too long": (
        lambda: patch({"layers.0.mlp_out": np.zeros((6, 13))}),
        "layers.0.mlp_out: the axis of positions of the new value has 6 entries, and 5 are to be "
        "replaced. Choose `positions` for it.",
    ),
    "not as many as are chosen": (
        lambda: patch({"layers.0.z": at(np.zeros((3, 10)), heads=[0, 1])}),
        "layers.0.z: the axis of heads of the new value has 3 entries, and 2 are to be replaced.",
    ),
    "too many axes": (
        lambda: patch({"layers.0.mlp_out": np.zeros((1, 1, 1, 13))}),
        "layers.0.mlp_out: the new value has 4 axes, (1, 1, 1, 13), and there are 3, (2, 5, 13).",
    ),
    "a function of another shape": (
        lambda: patch({"layers.0.mlp_out": lambda x: x[..., :3]}),
        "layers.0.mlp_out: the change must return the shape it is given, (2, 5, 13); got (2, ",
    ),
    "no heads there": (
        lambda: patch({"layers.0.mlp_out": at(0.0, heads=0)}),
        "layers.0.mlp_out has no heads to choose from; it has positions, features.",
    ),
    "no such head": (
        lambda: patch({"layers.0.z": at(0.0, heads=[6])}),
        "layers.0.z has 6 heads; got heads=[6].",
    ),
    "a head of floats": (lambda: at(0.0, heads=1.0), "`heads` must be integers, got 1.0."),
    "before the text": (
        lambda: at(0.0, positions=[-1]),
        "`positions` count from the beginning of a text, 0 is its first token; got -1.",
    ),
    "behind the text": (
        lambda: patch({"layers.0.z": at(0.0, positions=[5])}),
        "layers.0.z: positions=[5] lie outside of the text, which has 5 tokens, 0 to 4.",
    ),
    "behind the text, compiled": (
        lambda: patch({"embed": at(0.0, positions=[2, 9])}, transform=jax.jit),
        "embed: positions=[2, 9] lie outside of the text, which has 5 tokens, 0 to 4.",
    ),
    "in another part of the text": (
        lambda: interpret.patch(
            lambda m: m(TOKENS, positions=np.arange(5)[None] + np.array([[3], [0]])),
            MODEL,
            {"layers.0.z": at(0.0, positions=[1])},
        ),
        "positions=[1] lie outside of the text, which has the positions [[3, 4, 5, 6, 7]",
    ),
    "positions of no text": (
        lambda: interpret.patch(
            lambda m: m.final_norm(jnp.ones(13)), MODEL, {"final_norm": at(0.0, positions=[1])}
        ),
        "final_norm is reached by a call that does not say which tokens it is of",
    ),
    "a value of a program that has ended": (
        lambda: patch({"layers.0.mlp_out": leaked()}),
        "An array is used outside of the jit, grad, vmap or loop in which it was computed: call "
        "capture or patch inside of that function and return what you need from it.",
    ),
    "activations: one name": (
        lambda: interpret.activations(lambda m: m(TOKENS), MODEL, "layers.0.z"),
        "`names` must be a list of str, such as [\"layers.0.z\"]; got 'layers.0.z'.",
    ),
    "activations: never reached": (
        lambda: interpret.activations(lambda m: None, MODEL, ["layers.0.z"]),
        "The function never reached layers.0.z: call the model within it.",
    ),
    "activations: reached twice": (
        lambda: interpret.activations(lambda m: (m(TOKENS), m(TOKENS)), MODEL, ["embed"]),
        "embed is reached several times: call the model once within the function",
    ),
    "activations: inside of jit": (
        lambda: interpret.activations(
            lambda m: jax.jit(lambda m: m(TOKENS).logits)(m), MODEL, ["embed"]
        ),
        "embed is called inside of a loop or another transformation",
    ),
}


@pytest.mark.parametrize(("call", "says"), CALLS.values(), ids=CALLS)
def test_the_error_says_what_to_do(call, says):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert says in str(error.value)
    assert len(str(error.value)) < 400


def test_rows_without_a_chosen_position_are_nan_where_it_is_known_at_run_time_only():
    """As rows that do not fit a cache are: a change that changes nothing is never silent."""

    @jax.jit
    def run(position):
        changes = {"layers.0.mlp_out": at(0.0, positions=position)}
        positions = jnp.array([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]])
        return interpret.patch(lambda m: m(TOKENS, positions=positions).logits, MODEL, changes)

    assert np.isfinite(run(jnp.array([[4], [2]]))).all()
    first, second = np.isfinite(run(jnp.array([3])))
    assert first.all() and not second.any()
