"""What `capture_intermediates` collects: the whole tree, names, numbers, dtypes and values."""

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest


# Float32, sums in another order; relative to the largest entry of an array.
CLOSE = 2e-5

# Their Gemma 3n gathers its streams within the list that its last layer returned, so what they
# captured of that layer are projections of its streams, not the streams: see the last test.
OVERWRITTEN = {f"layer_5/__call__/0/1/{stream}" for stream in (1, 2, 3)}


def options(kind: str) -> dict:
    if kind != "gemma3 vision":
        return {"tokens": kinds.tokens()}
    pixels = np.random.default_rng(1).integers(0, 256, (2, 2, 13, 9, 3))
    return {
        "tokens": kinds.tokens().at[:, 1].set(kinds.IMAGE).at[0, 4].set(kinds.IMAGE),
        "images": jnp.asarray(pixels, jnp.uint8),
    }


def captured(model, variables, wanted=True, **given):
    @jax.jit(compiler_options=kinds.QUICK)
    def run(variables, given):
        _, state = model.apply(variables, capture_intermediates=wanted, **given)
        return state["intermediates"]

    with kinds.mended_router():
        return kinds.flat(run(variables, given))


def assert_same(ours, theirs):
    described = [
        {name: (leaf.shape, leaf.dtype.name) for name, leaf in tree.items()}
        for tree in (ours, theirs)
    ]
    assert described[0] == described[1]
    for name, expected in theirs.items():
        if name in OVERWRITTEN:
            continue
        wide, found = np.asarray(expected, np.float32), np.asarray(ours[name], np.float32)
        scale = np.abs(wide).max() + 1e-6
        np.testing.assert_allclose(found / scale, wide / scale, rtol=0, atol=CLOSE, err_msg=name)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_whole_tree(kind):
    theirs, ours, variables = kinds.models(kind)
    given = options(kind)
    expected = captured(theirs, variables, **given)
    assert len(expected) > 20
    assert_same(captured(ours, variables, **given), expected)


@pytest.mark.parametrize("kind", [kind for kind in kinds.KINDS if kind != "gemma3 vision"])
def test_the_whole_tree_with_a_cache(kind):
    theirs, ours, variables = kinds.models(kind)
    tokens = kinds.tokens()[:1]
    trees = []
    for model in (theirs, ours):
        cache = model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=tokens.shape[1])
        trees.append(captured(model, variables, tokens=tokens, cache=cache))
    expected, found = trees
    assert "layer_0/attn/__call__/0/0/end_index" in expected
    assert_same(found, expected)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_dtypes_of_bfloat16(kind):
    theirs, ours, variables = kinds.models(kind, jnp.bfloat16)
    trees = []
    for model in (theirs, ours):

        def run(variables, model=model):
            _, state = model.apply(variables, capture_intermediates=True, **options(kind))
            return state["intermediates"]

        shapes = kinds.flat(jax.eval_shape(run, variables))
        trees.append({name: leaf.dtype.name for name, leaf in shapes.items()})
    assert trees[1] == trees[0]


FILTERS = {
    "by name": lambda module, method: module.name == "mlp",
    "by the name of a module that shares a scope": lambda module, _: module.name == "Einsum_1",
    "by path": lambda module, method: module.path[-1:] == ("attn",) and method == "__call__",
    "by method": lambda module, method: method in ("encode", "decode"),
    "the whole model": lambda module, method: module.name is None and method == "__call__",
    "norms": lambda module, method: (module.name or "").endswith("norm") and method == "__call__",
}


@pytest.mark.parametrize("chosen", FILTERS)
@pytest.mark.parametrize("kind", ["gemma3", "gemma4 sharing"])
def test_filters_choose_the_same(kind, chosen):
    # Linen's own `jit` keeps what the first filter chose, also for the next one.
    jax.clear_caches()
    if kind not in kinds.KINDS:
        pytest.skip("this version of DeepMind's package has no Gemma 4")
    theirs, ours, variables = kinds.models(kind)
    trees = [
        captured(model, variables, FILTERS[chosen], **options(kind)) for model in (theirs, ours)
    ]
    assert trees[0]
    assert_same(trees[1], trees[0])


def test_a_feed_forward_has_one_value_by_its_name_and_three_in_its_scope():
    theirs, ours, variables = kinds.models("gemma3")
    for model in (theirs, ours):
        jax.clear_caches()
        by_name = captured(model, variables, FILTERS["by name"], **options("gemma3"))
        jax.clear_caches()
        assert set(by_name) == {f"layer_{i}/mlp/__call__/0" for i in range(2)}
        in_scope = captured(model, variables, **options("gemma3"))
        assert {f"layer_0/mlp/__call__/{i}" for i in range(3)} <= set(in_scope)
        np.testing.assert_array_equal(
            by_name["layer_0/mlp/__call__/0"], in_scope["layer_0/mlp/__call__/2"]
        )


def test_the_streams_of_the_last_layer_that_they_overwrite():
    theirs, ours, variables = kinds.models("gemma3n")
    expected = captured(theirs, variables, **options("gemma3n"))
    found = captured(ours, variables, **options("gemma3n"))
    target = np.sqrt(np.square(found["layer_5/__call__/0/1/0"]).mean(-1, keepdims=True))
    for stream in (1, 2, 3):
        name = f"layer_5/__call__/0/1/{stream}"
        weight = variables["params"][f"altup_unembed_projection_{stream - 1}"]
        projected = np.asarray(found[name]) @ np.asarray(*weight.values())
        size = np.sqrt(np.square(projected).mean(-1, keepdims=True))
        np.testing.assert_allclose(expected[name], projected * target / size, rtol=0, atol=1e-4)
