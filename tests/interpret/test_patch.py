"""Patching: the same as a model changed by hand, at every site of every generation."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import interpret, lora, quantize, sampling
from equigemma.nn import AbstractEinsum, attention_weights
from equigemma.nn._attention import AbstractAttentionFn, AbstractProjection
from equigemma.nn._block import AbstractBlock


TOKENS = tiny.tokens(2, 7)
SITES = [
    (kind, site)
    for kind, config in tiny.CONFIGS.items()
    for name, site in interpret.sites(tiny.model(config)).items()
    if name.startswith(("layers.1.", "layers.3.", "embed", "final_norm"))
]


def half(x):
    """A change that is exact in every dtype, and after which nothing is as before."""
    return jnp.flip(x, axis=-1) / 2


class Around(AbstractEinsum, AbstractProjection, AbstractBlock, AbstractAttentionFn):
    """Whatever a module is, called with another input or returning another output."""

    module: Any
    before: Callable = eqx.field(static=True, default=lambda *args: args)
    after: Callable = eqx.field(static=True, default=lambda result: result)
    eqn: str = eqx.field(static=True, default="")
    softcap: float | None = eqx.field(static=True, default=None)

    def __call__(self, *args):
        return self.after(self.module(*self.before(*args)))

    def __getattr__(self, name):
        return getattr(self.module, name)


def first(change):
    return lambda *values: (change(values[0]), *values[1:])


def second(change):
    return lambda x, other: (x, change(other))


def whole_pattern(module, change):
    def attend(q, k, v, mask_spec):
        pattern = attention_weights(q, k, mask_spec.mask(), softcap=module.softcap)
        shape = pattern.shape
        pattern = change(pattern.reshape(*shape[:-4], -1, *shape[-2:])).reshape(shape)
        return jnp.einsum("...KGLS,...KSH->...LKGH", pattern, v).reshape(q.shape)

    return DotProductAttention(attend, module.softcap)


class DotProductAttention(AbstractAttentionFn):
    function: Callable = eqx.field(static=True)
    softcap: float | None = eqx.field(static=True)

    def __call__(self, q, k, v, mask_spec):
        return self.function(q, k, v, mask_spec)


def component(index):
    return lambda change: lambda r: (*r[:index], change(r[index]), *r[index + 1 :])


def by_hand(model, site: interpret.Site, change) -> eg.Transformer:
    """The model with another module in the place that the site's name means."""
    *_, name = site.name.split(".")
    index = int(site.name.split(".")[1]) if "." in site.name else 0
    layer = model.layers[index]
    shared = hasattr(layer.attention, "query")
    post = layer.post_attention_norm is not None
    dense = (
        (lambda m: m.layers[index].ffw.dense)
        if hasattr(layer.ffw, "dense")
        else (lambda m: m.layers[index].ffw)
    )
    projection = lambda m: m.layers[index].attention.projection  # noqa: E731
    where, before, after = {
        "embed": (lambda m: m.embed, None, change),
        "final_norm": (lambda m: m.final_norm, None, change),
        "resid_pre": (lambda m: m.layers[index], first(change), None),
        "attn_normed": (lambda m: m.layers[index].pre_attention_norm, None, change),
        "q": (lambda m: m.layers[index].attention.query, None, change)
        if shared
        else (projection, None, component(0)(change)),
        "k": (projection, None, component(1)(change)),
        "v": (projection, None, component(2)(change)),
        "pattern": (lambda m: m.layers[index].attention.attention_fn, None, None),
        "z": (lambda m: m.layers[index].attention.output, first(change), None),
        "attn_out": (lambda m: m.layers[index].post_attention_norm, None, change)
        if post
        else (lambda m: m.layers[index].attention, None, component(0)(change)),
        "resid_mid": (lambda m: m.layers[index].resid_mid, None, change),
        "mlp_normed": (lambda m: m.layers[index].pre_ffw_norm, None, change),
        "mlp_post": (lambda m: dense(m).down, first(change), None),
        "router": (lambda m: m.layers[index].ffw.router.logits, None, change),
        "mlp_out": (lambda m: m.layers[index].post_ffw_norm, None, change)
        if post
        else (lambda m: m.layers[index].ffw, None, change),
        "per_layer_input": (lambda m: m.layers[index].per_layer_gate, second(change), None),
        "resid_post": (lambda m: m.layers[index], None, component(0)(change)),
    }[name]
    if name == "pattern":
        return eqx.tree_at(where, model, whole_pattern(where(model), change))
    options = {key: value for key, value in (("before", before), ("after", after)) if value}
    return eqx.tree_at(where, model, Around(where(model), **options))


def on_stream(site, change):
    """Of parallel streams the second one, for both ways of changing."""
    if site.streams is None:
        return change, change
    return interpret.at(change, stream=1), lambda x: x.at[1].set(change(x[1]))


def is_slow(kind: str, site: interpret.Site) -> bool:
    """Experts are a loop, which is compiled for each call."""
    return kind == "gemma4 experts" and not site.name.endswith("router")


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        pytest.param(
            *row, marks=[pytest.mark.slow] if is_slow(*row) else [], id=f"{row[0]}: {row[1].name}"
        )
        for row in SITES
    ],
)
def test_as_changed_by_hand(kind, site):
    model = tiny.model(tiny.CONFIGS[kind])
    change, same = on_stream(site, half)

    # Operation by operation, which needs no program for each site.
    found = interpret.patch(lambda m: m(TOKENS).logits, model, {site.name: change})
    plain = model(TOKENS).logits
    expected = by_hand(model, site, same)(TOKENS).logits
    assert not np.array_equal(found, plain)
    if site.name.endswith("pattern"):  # another way to write the product with the values
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, expected)


def changes_of(model, change=half, stream=1, **places) -> dict[str, interpret.At]:
    """One at every site, all together."""
    return {
        name: interpret.at(change, stream=stream if site.streams else None, **places)
        for name, site in interpret.sites(model).items()
        if name != "final_norm"
    }


KINDS = [
    "gemma2",
    "gemma3n",
    "gemma4 small",
    pytest.param("gemma4 experts", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind", KINDS)
def test_no_change_is_the_same_bits(kind):
    model = tiny.model(tiny.CONFIGS[kind])
    names = list(interpret.sites(model))
    plain = tiny.run(model, TOKENS).logits

    def read_and_put_back(model):
        logits, values = interpret.activations(lambda m: m(TOKENS).logits, model, names)
        changes = changes_of(model, lambda x: x)
        changes |= {n: v for n, v in values.items() if interpret.sites(model)[n].streams is None}
        del changes["final_norm"], changes[names[-2]]  # with which all before would be of no effect
        chosen = changes_of(model, lambda x: 0 * x + x, positions=[2], stream=0)
        return (
            logits,
            interpret.patch(lambda m: m(TOKENS).logits, model, changes),
            interpret.patch(lambda m: m(TOKENS).logits, model, chosen),
        )

    if kind == "gemma3n":
        # Compiled, XLA fuses the sums of streams with what is around, and rounds a product and a
        # sum once or twice: operation by operation nothing is fused.
        plain, run = model(TOKENS).logits, read_and_put_back
    else:
        run = eqx.filter_jit(read_and_put_back, compiler_options=tiny.QUICK)
    for logits in run(model):
        np.testing.assert_array_equal(logits, plain)


class TestPlaces:
    """Positions, heads and features of a change."""

    MODEL = tiny.model(tiny.GEMMA3)

    def read(self, site, changes):
        def function(model):
            return interpret.activations(lambda m: m(TOKENS), model, [site])[1][site]

        return interpret.patch(function, self.MODEL, changes)

    def test_all_combinations_are_replaced_and_nothing_else(self):
        value = tiny.normal(0, 2, 2, 1)
        places = dict(positions=[5, 1], heads=[-1, 0], features=[3])
        before = np.array(self.read("layers.0.z", {"layers.1.z": 0.0}))
        after = self.read("layers.0.z", {"layers.0.z": interpret.at(value, **places)})
        for i, position in enumerate(places["positions"]):
            for j, head in enumerate(places["heads"]):
                before[:, position, head, 3] = value[i, j, 0]
        np.testing.assert_array_equal(after, before)

    def test_positions_of_each_row(self):
        value = tiny.normal(0, 2, 1, tiny.WIDTH)
        before = np.array(self.read("layers.0.mlp_out", {"layers.1.z": 0.0}))
        change = interpret.at(value, positions=jnp.array([[3], [6]]))
        after = self.read("layers.0.mlp_out", {"layers.0.mlp_out": change})
        before[0, 3], before[1, 6] = value[:, 0]
        np.testing.assert_array_equal(after, before)

    def test_attention_to_a_key_is_knocked_out(self):
        change = {"layers.1.pattern": interpret.at(0.0, heads=[2], keys=[0, 4])}
        before = np.array(self.read("layers.1.pattern", {"layers.1.z": 0.0}))
        after = self.read("layers.1.pattern", change)
        before[:, 2, :, [0, 4]] = 0
        np.testing.assert_array_equal(after, before)

    def test_changes_of_one_site_apply_in_order(self):
        changes = {"layers.*.mlp_out": 1.0, "layers.0.mlp_out": interpret.at(lambda x: 3 * x)}
        assert (np.asarray(self.read("layers.0.mlp_out", changes)) == 3).all()

    def test_modules_by_their_paths(self):
        changes = {"layers.0.ffw:input": 1.0, "layers.0.attention:output.0": 2.0}
        found = self.read("layers.0.ffw:input", changes)
        assert (np.asarray(found) == 1).all()
        found = self.read("layers.0.attention:output.0", changes)
        assert (np.asarray(found) == 2).all()


def test_vmap_over_values_positions_and_heads_is_the_loop():
    model = tiny.model(tiny.GEMMA2)
    values, positions, heads = tiny.normal(0, 3, 10), jnp.array([0, 6, 3]), jnp.array([5, 0, 2])

    @jax.jit
    def one(value, position, head):
        change = interpret.at(value, positions=position, heads=head)
        return interpret.patch(lambda m: m(TOKENS).logits, model, {"layers.1.z": change})

    whole = jax.jit(jax.vmap(one))(values, positions, heads)
    each = jnp.stack([one(*row) for row in zip(values, positions, heads, strict=True)])
    # Sums of other shapes.
    np.testing.assert_allclose(whole, each, rtol=0, atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_with_a_cache_and_without(kind):
    """Chunks of several tokens and single ones, through rings that are full before the end."""
    model, tokens = tiny.model(tiny.CONFIGS[kind]), tiny.tokens(2, 11)
    changes = changes_of(model, lambda x: x * 1.5, positions=[1, 4, 8, 10])
    for name in changes:
        if name.endswith("pattern"):
            changes[name] = interpret.at(0.0, keys=[0, 3], heads=[1])
    expected = interpret.patch(lambda m: tiny.run(m, tokens), model, changes)
    cache = tiny.empty_cache(model.config, (2,), capacity=11)
    output = interpret.patch(
        lambda m: tiny.run_in_chunks(m, tokens, (4, 1, 1, 4, 1), cache=cache), model, changes
    )
    assert np.abs(expected.logits - tiny.run(model, tokens).logits).max() > 0.1
    np.testing.assert_allclose(output.logits, expected.logits, rtol=0, atol=2e-5)


class TestGeneration:
    MODEL = tiny.model(tiny.GEMMA3)
    CHANGES = {"layers.0.resid_post": interpret.at(lambda x: 3 * jnp.flip(x, -1), positions=[2, 9])}

    def generated(self, changes, function=sampling.generate):
        options = dict(max_new_tokens=9)
        return interpret.patch(lambda m: function(m, TOKENS, **options), self.MODEL, changes)

    def expected(self):
        """Token by token, each time the whole text."""
        tokens = np.asarray(TOKENS)
        for length in range(7, 16):
            text = np.zeros((2, 16), np.int32)
            text[:, :length] = tokens
            logits = interpret.patch(lambda m: tiny.run(m, text).logits, self.MODEL, self.CHANGES)
            tokens = np.append(tokens, np.argmax(logits[:, length - 1], -1)[:, None], axis=-1)
        return tokens[:, 7:]

    @pytest.mark.slow
    def test_generate_and_stream(self):
        found = self.generated(self.CHANGES).tokens
        np.testing.assert_array_equal(found, self.expected())
        streamed = self.generated(self.CHANGES, lambda *a, **k: list(sampling.stream(*a, **k)))
        np.testing.assert_array_equal(np.stack(streamed, -1), found)
        assert not np.array_equal(
            found, sampling.generate(self.MODEL, TOKENS, max_new_tokens=9).tokens
        )

    def test_other_values_run_the_same_program(self):
        runs = []

        @eqx.filter_jit
        def run(model):
            runs.append(None)
            return model(TOKENS).logits

        def patched(value, site="layers.0.mlp_out"):
            return interpret.patch(run, self.MODEL, {site: interpret.at(value, positions=[3])})

        one, other = patched(1.0), patched(2.0)
        assert len(runs) == 1 and not np.array_equal(one, other)
        np.testing.assert_array_equal(one, patched(1.0))
        patched(1.0, "layers.1.mlp_out")
        assert len(runs) == 2

    def test_never_reached_is_an_error_each_time(self):
        @eqx.filter_jit
        def run(model):
            return model.layers[0].ffw(jnp.ones((2, tiny.WIDTH)))

        for _ in range(2):
            with pytest.raises(ValueError, match="never reached layers.1.mlp_out, so nothing"):
                interpret.patch(run, self.MODEL, {"layers.1.mlp_out": 0.0})

    def test_a_generator_that_was_not_run(self):
        with pytest.raises(ValueError, match="let generators run to their end"):
            self.generated(self.CHANGES, lambda *a, **k: (x for x in sampling.stream(*a, **k)))


@pytest.mark.parametrize("form", ["prepared", "int8", "lora"])
def test_forms_of_the_model(form):
    plain = tiny.model(tiny.GEMMA3)
    model = {
        "prepared": eg.prepare,
        "int8": quantize.int8,
        "lora": lambda m: lora.add(m, rank=2, key=jax.random.key(0)),
    }[form](plain)
    changes = changes_of(model, 0.5, positions=[3])
    found = interpret.patch(lambda m: tiny.run(m, TOKENS).logits, model, changes)
    expected = interpret.patch(lambda m: tiny.run(m, TOKENS).logits, plain, changes)
    tolerance = dict(rtol=0, atol=0.3 if form == "int8" else 1e-5)
    np.testing.assert_allclose(found, expected, **tolerance)


def test_the_gradient_by_a_change_is_that_of_finite_differences():
    model = tiny.model(tiny.GEMMA2)

    @jax.jit
    def loss(value):
        changes = {"layers.0.pattern": interpret.at(lambda x: x + value[None, None], heads=[1])}
        return interpret.patch(lambda m: m(TOKENS).logits.var(), model, changes)

    value, direction = jnp.zeros((7, 7)), tiny.normal(0, 7, 7)
    slope = jnp.vdot(jax.grad(loss)(value), direction)
    step = 1e-2
    ahead, behind = loss(step * direction), loss(-step * direction)
    # Float32: of the difference some four digits are left.
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=5e-3)
    assert abs(slope) > 1e-3


def test_captured_and_patched_at_once():
    model = tiny.model(tiny.GEMMA3)
    changes = {"layers.0.mlp_out": 1.0, "embed": 2.0}

    def run(model):
        return interpret.capture(lambda m: m(TOKENS), model, ["layers.0.post_ffw_norm", "embed"])[1]

    embed, mlp = interpret.patch(run, model, changes)
    assert (embed.path, mlp.path) == ("embed", "layers.0.post_ffw_norm")
    assert (np.asarray(embed.result) == 2).all() and (np.asarray(mlp.result) == 1).all()


def test_a_patched_model_is_patched_again():
    model = tiny.model(tiny.GEMMA3)
    for site in ("layers.0.z", "layers.0.mlp_out", "layers.0.pattern"):

        def twice(model, site=site):
            add = lambda x: x + 1.0  # noqa: E731
            return interpret.patch(
                lambda m: interpret.activations(lambda m: m(TOKENS), m, [site])[1],
                model,
                {site: add},
            )

        found = interpret.patch(twice, model, {site: 2.0})[site]
        assert (np.asarray(found) == 3).all()
