"""Lenses, attribution by gradients, steering and sweeps, against sums, differences and loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma import interpret, sampling


TOKENS = tiny.tokens(2, 5)
KINDS = [
    "gemma1 mqa",
    "gemma2",
    "gemma4 small",
    pytest.param("gemma4 experts", marks=pytest.mark.slow),
]


def metric(tokens=TOKENS):
    return lambda model: model(tokens).logits[0, -1, 3] - model.config.vocab


@pytest.mark.parametrize("kind", ["gemma2", pytest.param("gemma3n", marks=pytest.mark.slow)])
def test_the_lens_on_the_last_layer_gives_the_logits(kind):
    model = tiny.model(tiny.CONFIGS[kind])
    last = f"layers.{len(model.layers) - 1}.resid_post"
    output, values = interpret.activations(lambda m: m(TOKENS), model, [last])
    np.testing.assert_array_equal(interpret.logit_lens(model, values[last]), output.logits)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_sum_of_their_parts(kind, by_head):
    model = tiny.model(tiny.CONFIGS[kind])
    targets = tiny.tokens(2, 5, seed=1)
    logits, parts = interpret.logit_attribution(model, TOKENS, targets, by_head=by_head)
    softcap = model.config.final_softcap
    found = logits if softcap is None else softcap * np.tanh(logits / softcap)
    expected = np.take_along_axis(model(TOKENS).logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    total = sum(
        np.asarray(part, np.float64).sum(axis=tuple(range(2, part.ndim))) for part in parts.values()
    )
    np.testing.assert_allclose(total, logits, rtol=0, atol=1e-5)
    heads = {part.shape[2:] for name, part in parts.items() if name.endswith("attn_out")}
    assert heads == {(model.config.layers[0].attention.heads,) if by_head else ()}


def test_parallel_streams_are_no_sum():
    model = tiny.model(tiny.GEMMA3N)
    with pytest.raises(ValueError, match="logits are no sum over layers. Use logit_lens"):
        interpret.logit_attribution(model, TOKENS, TOKENS)


def test_rollout():
    patterns = np.asarray(jax.nn.softmax(tiny.normal(0, 3, 2, 4, 5, 5)))
    expected = np.eye(5)
    for layer in patterns.astype(np.float64):
        expected = (layer.mean(axis=1) / 2 + np.eye(5) / 2) @ expected
    np.testing.assert_allclose(interpret.attention_rollout(patterns), expected, rtol=1e-6)


@pytest.mark.slow
def test_attribution_is_the_derivative_in_float64():
    names = ["layers.0.z", "layers.1.mlp_post", "layers.1.pattern"]
    with jax.enable_x64(True):
        model = jax.tree.map(lambda w: w.astype(jnp.float64), tiny.model(tiny.GEMMA3))
        own = interpret.activations(lambda m: m.trunk(TOKENS)[0], model, names)[1]
        values = {n: v + tiny.normal(1, *v.shape, dtype=np.float64) for n, v in own.items()}
        measure = lambda m: jnp.sin(m.trunk(TOKENS)[0]).sum()  # noqa: E731
        scores = interpret.attribution(measure, model, values)
        for name, score in scores.items():
            ahead, behind = (
                interpret.patch(measure, model, {name: own[name] + s * (values[name] - own[name])})
                for s in (1e-5, -1e-5)
            )
            np.testing.assert_allclose(score.sum(), (ahead - behind) / 2e-5, rtol=1e-7)


def test_integrated_gradients_are_complete():
    model = tiny.model(tiny.GEMMA2)
    value, baseline = tiny.normal(1, 2, 5, tiny.WIDTH), tiny.normal(2, 2, 5, tiny.WIDTH)
    site = "layers.1.resid_pre"
    found = jax.jit(
        lambda: interpret.integrated_gradients(metric(), model, site, value, baseline, steps=24)
    )()
    ends = [interpret.patch(metric(), model, {site: end}) for end in (value, baseline)]
    # Of a polynomial of 47th degree it would be exact.
    np.testing.assert_allclose(found.sum(), ends[0] - ends[1], rtol=0, atol=1e-3)
    assert abs(ends[0] - ends[1]) > 0.1


def test_a_sweep_is_a_loop_of_patches():
    model, other = tiny.model(tiny.GEMMA3), tiny.tokens(2, 5, seed=3)
    names = ["layers.0.z", "layers.1.z"]
    values = interpret.activations(lambda m: m(other), model, names)[1]
    positions, heads = [4, 2], [0, 3, 5]
    found = interpret.sweep(metric(), model, values, positions=positions, heads=heads, batch=5)

    @jax.jit
    def one(value, position, head):
        change = interpret.at(lambda x: value, positions=position, heads=head)
        return [interpret.patch(metric(), model, {name: change}) for name in names]

    assert found.shape == (2, 2, 3)
    for i, name in enumerate(names):
        for j, position in enumerate(positions):
            for k, head in enumerate(heads):
                expected = one(values[name], position, head)[i]
                np.testing.assert_allclose(found[i, j, k], expected, rtol=0, atol=1e-5)
    # All but those of the last layer at a position that is not the last differ.
    assert len(np.unique(found)) == found.size - 2


def test_a_picture_of_a_sweep():
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("agg")
    axes = interpret.plot(np.array([[1.0, -2.0, 0.5], [0.0, 1.0, 2.0]]), ["a", "b", "c"])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert axes.images[0].get_clim() == (-2, 2)


class TestSteering:
    MODEL = tiny.model(tiny.GEMMA2)

    def test_a_direction_is_the_difference_of_means(self):
        positive, negative = tiny.normal(0, 4, 3, 7), tiny.normal(1, 5, 7)
        expected = np.mean(positive, (0, 1)) - np.mean(negative, 0)
        np.testing.assert_allclose(interpret.direction(positive, negative), expected, rtol=1e-5)

    def test_changes(self):
        x, vector = tiny.normal(0, 2, 5, 7), tiny.normal(1, 7)
        added = interpret.Add(vector, -2.0)(x)
        np.testing.assert_allclose(added, x - 2 * vector[None, None], rtol=1e-6)
        left = interpret.Ablate(vector)(x)
        np.testing.assert_allclose(left @ vector, np.zeros((2, 5)), atol=1e-5)
        others = x - (x @ vector)[..., None] * vector[None, None] / (vector @ vector)
        np.testing.assert_allclose(left, others, rtol=0, atol=1e-6)

    @pytest.mark.slow
    def test_while_generating(self):
        """Towards the embedding of a token, of which nothing else is then said."""
        vector = self.MODEL.embedding.table[17]
        change = interpret.Add(vector, 200.0)

        def run(model):
            return sampling.generate(model, TOKENS, max_new_tokens=4).tokens

        assert (interpret.patch(run, self.MODEL, {"layers.1.resid_post": change}) == 17).all()
        assert not (run(self.MODEL) == 17).all()

    def test_where_a_probe_says_so(self):
        x, vector = tiny.normal(0, 2, 5, 7), tiny.normal(1, 7)
        where = interpret.Where(interpret.LinearProbe(vector, -0.5), interpret.Add(vector, 2.0))
        holds = np.asarray(x, np.float64) @ np.asarray(vector) > 0.5
        assert 0 < holds.sum() < holds.size
        expected = np.where(holds[..., None], x + 2 * vector[None, None], x)
        np.testing.assert_allclose(where(x), expected, rtol=1e-6)

    def test_a_condition_of_another_shape(self):
        where = interpret.Where(lambda x: x > 0, interpret.Ablate(jnp.ones(7)))
        with pytest.raises(ValueError, match=r"one truth value for each vector, bool\(2, 5\); got"):
            where(tiny.normal(0, 2, 5, 7))

    @pytest.mark.slow
    def test_a_condition_while_generating(self):
        """With a cache each token is judged as it is without one."""
        vector = tiny.normal(4, tiny.WIDTH)
        probe = interpret.LinearProbe(vector, -1.0)
        change = interpret.Where(probe, interpret.Add(self.MODEL.embedding.table[17], 200.0))
        changes = {"layers.0.resid_post": change}

        def run(model):
            return sampling.generate(model, TOKENS, max_new_tokens=6).tokens

        found = interpret.patch(run, self.MODEL, changes)
        texts = TOKENS
        for _ in range(6):
            logits = interpret.patch(lambda m: m(texts).logits, self.MODEL, changes)  # noqa: B023
            texts = jnp.concatenate([texts, logits[:, -1].argmax(-1)[:, None]], axis=1)
        np.testing.assert_array_equal(found, texts[:, TOKENS.shape[1] :])
        read = lambda m: interpret.activations(lambda m: m(texts), m, [*changes])[1]  # noqa: E731
        holds = probe(read(self.MODEL)[next(iter(changes))])
        assert 0 < holds.sum() < holds.size
