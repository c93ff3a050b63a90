"""Sparse autoencoders: the formulas in float64, files as Gemma Scope has them, and in a model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma import interpret, sampling
from equigemma.interpret import sae


MODEL, TOKENS = tiny.model(tiny.GEMMA3), tiny.tokens(2, 5)
D, N = tiny.WIDTH, 19


def parameters(width=D, out=D, seed=0, affine=False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = dict(w_enc=(width, N), w_dec=(N, out), b_enc=(N,), b_dec=(out,), threshold=(N,))
    if affine:
        shapes["affine_skip_connection"] = (width, out)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def jump_relu(x, w):
    """In float64. The bias of the decoder is not subtracted from the input."""
    x, w = np.asarray(x, np.float64), {k: v.astype(np.float64) for k, v in w.items()}
    before = x @ w["w_enc"] + w["b_enc"]
    features = np.maximum(before, 0) * (before > w["threshold"])
    skip = w.get("affine_skip_connection")
    return features, features @ w["w_dec"] + w["b_dec"] + (0 if skip is None else x @ skip)


def save(folder, weights, config=None):
    folder.mkdir(parents=True)
    if "gemma-scope-2-" in str(folder):
        numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
        numpy.save_file(weights, folder / "params.safetensors")
    else:
        upper = {k.replace("w_", "W_"): v for k, v in weights.items()}
        np.savez(folder / "params.npz", **upper)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


ONE = "gemma-scope-2b-pt-{}/layer_1/width_16k/average_l0_71"
TWO = "gemma-scope-2-270m-it/{}/layer_1_width_16k_l0_medium{}"
HOOK = "model.layers.1."
FOLDERS = {
    "1, res": (ONE.format("res"), None, sae.Place("layers.1.resid_post", "layers.1.resid_post")),
    "1, mlp": (ONE.format("mlp"), None, sae.Place("layers.1.mlp_out", "layers.1.mlp_out")),
    "1, att": (ONE.format("att"), None, sae.Place("layers.1.z", "layers.1.z")),
    "1, transcoder": (
        ONE.format("transcoders"),
        None,
        sae.Place("layers.1.mlp_normed", "layers.1.mlp_out", without_weight=True),
    ),
    "2, res": (
        TWO.format("resid_post_all", ""),
        None,
        sae.Place("layers.1.resid_post", "layers.1.resid_post"),
    ),
    "2, att": (TWO.format("attn_out", ""), None, sae.Place("layers.1.z", "layers.1.z")),
    "2, transcoder": (
        TWO.format("transcoder", "_affine"),
        None,
        sae.Place("layers.1.mlp_normed", "layers.1.mlp_out"),
    ),
    "2, mlp, config": (
        "gemma-scope-2-270m-it/somewhere",
        dict(architecture="jump_relu", hf_hook_point_in=HOOK + "post_feedforward_layernorm.output"),
        sae.Place("layers.1.mlp_out", "layers.1.mlp_out"),
    ),
    "2, transcoder, config": (
        "gemma-scope-2-270m-it/somewhere",
        dict(
            architecture="jump_relu",
            hf_hook_point_in=HOOK + "pre_feedforward_layernorm.output",
            hf_hook_point_out=HOOK + "post_feedforward_layernorm.output",
            affine_connection=True,
        ),
        sae.Place("layers.1.mlp_normed", "layers.1.mlp_out"),
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_files(kind, tmp_path):
    name, config, place = FOLDERS[kind]
    width = 60 if place.reads.endswith(".z") else D
    weights = parameters(width, width, affine="transcoder" in kind and "2" in kind)
    loaded, found = sae.load(save(tmp_path / name, weights, config))
    assert found == place
    x = tiny.normal(1, 3, 4, width)
    features, again = jump_relu(x, weights)
    assert 0.1 < (features > 0).mean() < 0.9
    np.testing.assert_allclose(loaded.encode(x), features, rtol=0, atol=1e-5)
    np.testing.assert_allclose(loaded(x), again, rtol=0, atol=1e-4)
    np.testing.assert_allclose(sae.l0(loaded.encode(x)), (features > 0).sum(-1).mean(), rtol=1e-6)

    changes = sae.splice(loaded, place, MODEL)
    run = lambda m: m(TOKENS).logits  # noqa: E731
    found = interpret.patch(run, MODEL, changes)
    np.testing.assert_allclose(found, run(MODEL), rtol=0, atol=1e-4)  # the error term


def test_gated_and_top_k_are_their_formulas():
    w = parameters()
    x = tiny.normal(1, 3, 4, D)
    product = np.asarray(x, np.float64) @ w["w_enc"].astype(np.float64)
    gate, mag, r = (tiny.normal(i, N) for i in (2, 3, 4))
    gated = sae.Gated(*map(jnp.asarray, (w["w_enc"], w["w_dec"])), gate, mag, r, w["b_dec"])
    gate, mag, r = map(np.asarray, (gate, mag, r))
    expected = (product + gate > 0) * np.maximum(product * np.exp(r) + mag, 0)
    np.testing.assert_allclose(gated.encode(x), expected, rtol=0, atol=1e-4)

    top = sae.TopK(*(jnp.asarray(w[n]) for n in ("w_enc", "w_dec", "b_enc", "b_dec")), k=6)
    before = product + w["b_enc"]
    least = np.sort(before, -1)[..., -6, None]
    expected = np.where(before >= least, np.maximum(before, 0), 0)
    np.testing.assert_allclose(top.encode(x), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(top(x), expected @ w["w_dec"] + w["b_dec"], rtol=0, atol=1e-4)


def loaded(**options) -> sae.JumpReLU:
    w = {name: jnp.asarray(value) for name, value in parameters(**options).items()}
    return sae.JumpReLU(skip=w.pop("affine_skip_connection", None), **w)


SITE = sae.Place("layers.0.resid_post", "layers.0.resid_post")


def test_an_ablated_feature_changes_the_value_by_its_own_part():
    scope = loaded()
    off = lambda f: f.at[..., 3].set(0.0)  # noqa: E731
    read = lambda m: interpret.activations(lambda m: m(TOKENS), m, [SITE.reads])[1]  # noqa: E731
    before = read(MODEL)[SITE.reads]
    after = interpret.patch(read, MODEL, sae.splice(scope, SITE, MODEL, off))[SITE.reads]
    _, features = sae.features(scope, SITE, lambda m: m(TOKENS), MODEL)
    assert (np.asarray(features)[..., 3] > 0).any()
    part = features[..., 3, None] * scope.w_dec[3][None, None]
    np.testing.assert_allclose(after, before - part, rtol=0, atol=1e-4)


def test_gradients_go_through_the_features_alone():
    scope = loaded()

    def loss(gain):
        changes = sae.splice(scope, SITE, MODEL, lambda f: f * gain)
        read = lambda m: interpret.activations(lambda m: m(TOKENS), m, [SITE.reads])[1]  # noqa: E731
        return interpret.patch(read, MODEL, changes)[SITE.reads].sum()

    _, features = sae.features(scope, SITE, lambda m: m(TOKENS), MODEL)
    expected = (features @ scope.w_dec).sum()
    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(())), expected, rtol=1e-5)


def test_transcoders_of_gemma_scope_1_read_without_the_weight_of_the_norm():
    scope = loaded()
    place = sae.Place("layers.0.mlp_normed", "layers.0.mlp_out", without_weight=True)
    _, features = sae.features(scope, place, lambda m: m(TOKENS), MODEL)
    _, values = interpret.activations(lambda m: m(TOKENS), MODEL, ["layers.0.resid_mid"])
    x = np.asarray(values["layers.0.resid_mid"], np.float64)
    bare = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    expected, _ = jump_relu(bare, parameters())
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)


def test_measures():
    x, again = tiny.normal(0, 4, 5, 7), tiny.normal(1, 4, 5, 7)
    rows = np.asarray(x, np.float64).reshape(-1, 7)
    left = np.square(rows - np.asarray(again).reshape(-1, 7)).sum()
    expected = 1 - left / (rows.var(axis=0).sum() * len(rows))
    np.testing.assert_allclose(sae.variance_explained(x, again), expected, rtol=1e-5)
    assert sae.loss_recovered(2.0, 3.0, 6.0) == 0.75


def wrong_file(tmp_path, **weights):
    return sae.load(save(tmp_path / ONE.format("res"), weights))


WRONG = {
    "nothing there": (
        lambda p: sae.load(p, place=SITE),
        "holds neither params.npz (Gemma Scope 1)",
    ),
    "something else": (
        lambda p: wrong_file(p, a=np.ones(3)),
        "is no SAE of Gemma Scope: it should",
    ),
    "over layers": (
        lambda p: wrong_file(p, **parameters() | {"w_dec": np.ones((N, 2, D))}),
        "is a cross-layer transcoder: it writes to several layers",
    ),
    "of two sizes": (
        lambda p: wrong_file(p, **parameters() | {"b_enc": np.ones(3)}),
        "b_enc should be (19,), got (3,).",
    ),
    "rescaled": (
        lambda p: wrong_file(p, **parameters(), scaling_factor=np.full(N, 2.0)),
        "scaling_factor is not 1",
    ),
    "no place": (
        lambda p: sae.load(save(p / "x" / "layer_1", parameters())),
        "no site is named by this path; pass `place=`.",
    ),
    "no norm there": (
        lambda p: sae.splice(
            loaded(), sae.Place("layers.0.mlp_out", "layers.0.mlp_out", without_weight=True), MODEL
        ),
        "layers.0.mlp_out is no output of a norm: `without_weight` is for sites like layers.3.mlp_",
    ),
    "another width": (
        lambda p: interpret.patch(
            lambda m: m(TOKENS), MODEL, sae.splice(loaded(width=7), SITE, MODEL)
        ),
        "layers.0.resid_post is 13 wide, and the SAE reads 7: it is one of another model or site.",
    ),
}


@pytest.mark.parametrize(("call", "says"), WRONG.values(), ids=WRONG)
def test_the_error_says_what_to_do(call, says, tmp_path):
    with pytest.raises(ValueError) as error:
        call(tmp_path)
    assert says in str(error.value)


@pytest.mark.slow
def test_other_weights_run_the_same_program():
    """Weights are inputs of what is compiled, also in a loop that generates."""
    runs = []

    @jax.jit
    def run(model):
        runs.append(None)
        return model(TOKENS).logits

    def half(features):
        return features / 2

    one, other = (
        interpret.patch(run, MODEL, sae.splice(loaded(seed=seed), SITE, MODEL, half))
        for seed in (0, 1)
    )
    assert len(runs) == 1 and not np.array_equal(one, other)


@pytest.mark.slow
def test_steered_while_generating():
    changes = sae.splice(loaded(), SITE, MODEL, lambda f: f.at[..., 5].add(1e4))

    def run(model):
        return sampling.generate(model, TOKENS, max_new_tokens=3).tokens

    assert not np.array_equal(interpret.patch(run, MODEL, changes), run(MODEL))
