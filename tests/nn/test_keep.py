"""Hidden states of a few tokens only: those of a whole pass, at less cost where layers share keys.

All in float32. What differs from a whole pass is the order of sums in products of other shapes:
hidden states, of magnitude 1 after a norm, agree to 1e-5.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import interpret, quantize, sampling
from equigemma.nn._context import first_without_keys


LENGTH = 7
KEEP = np.array([[6, 2], [0, 3], [1, 1]])
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
SHARING = ["gemma3n", "gemma4 small"]
FORMS = {
    "plain": lambda model: model,
    "prepared": eg.prepare,
    "xla": lambda model: eg.prepare(model, attention="xla"),
    "int8": quantize.int8,
    "int4": lambda model: quantize.int4(model, group_size=4),
}


def kept(model, tokens, keep, **options):
    """Hidden states of `keep`, and the cache, with it and without."""
    less = tiny.call(model, "trunk", tokens, keep=jnp.asarray(keep, jnp.int32), **options)
    hidden, cache = tiny.call(model, "trunk", tokens, **options)
    return less, (np.take_along_axis(np.asarray(hidden), keep[..., None], axis=-2), cache)


def check(less, whole):
    np.testing.assert_allclose(less[0], whole[0], **ROUNDING)
    assert jax.tree.structure(less[1]) == jax.tree.structure(whole[1])
    for ours, theirs in zip(jax.tree.leaves(less[1]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["gemma1 mqa", "gemma3", "gemma3n", "gemma4 experts"])
def test_of_every_kind_of_model_without_a_cache(name):
    check(*kept(tiny.model(tiny.CONFIGS[name]), tiny.tokens(3, LENGTH), KEEP))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [("gemma3n", "plain"), ("gemma3n", "int8"), ("gemma4 small", "xla")]
    + [("gemma4 small", "prepared"), ("gemma4 small", "int4")],
)
def test_of_every_form_behind_a_cache_in_ragged_rows(name, form):
    model = FORMS[form](tiny.model(tiny.CONFIGS[name]))
    # The second call's rings are full: its queries look at old keys and new ones side by side.
    cache = tiny.empty_cache(model.config, (3,), capacity=2 * LENGTH)
    _, cache = tiny.call(model, "trunk", tiny.tokens(3, LENGTH, seed=1), cache=cache)
    lengths = np.array([7, 4, 2])
    steps = np.arange(LENGTH)
    positions = np.where(steps < lengths[:, None], LENGTH + steps, -1)
    check(
        *kept(
            model,
            tiny.tokens(3, LENGTH),
            KEEP,
            cache=cache,
            positions=jnp.asarray(positions, jnp.int32),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARING)
def test_under_a_mask_and_with_texts_in_one_row(name):
    model, tokens = tiny.model(tiny.CONFIGS[name]), tiny.tokens(3, LENGTH)
    seen = np.tri(LENGTH, dtype=bool) & (np.random.default_rng(0).random((3, LENGTH, LENGTH)) < 0.6)
    mask = jnp.asarray(seen | np.eye(LENGTH, dtype=bool))
    check(*kept(model, tokens, KEEP, mask=mask))
    cache = tiny.empty_cache(model.config, (3,), capacity=LENGTH)
    check(*kept(model, tokens, KEEP, mask=mask, cache=cache))
    segments = jnp.asarray(np.broadcast_to([0, 0, 0, 1, 1, 1, 1], (3, LENGTH)))
    check(*kept(model, tokens, KEEP, segments=segments))


def test_with_images():
    config = tiny.seeing(tiny.GEMMA4_SMALL)
    model, row = tiny.model(config), [3, 29, -2, -3, -4, -5, 30]
    soft = tiny.normal(0, 1, 4, tiny.WIDTH)
    # Soft tokens look ahead, to the end of their image.
    check(*kept(model, jnp.asarray(row, jnp.int32), np.array([2, 6]), soft_tokens=soft))


def test_of_a_stacked_model():
    model = eg.stack(tiny.model(tiny.GEMMA3.with_layers([0, 1, 0, 1])))
    check(*kept(model, tiny.tokens(3, LENGTH), KEEP))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARING)
def test_prefill_gives_what_whole_passes_give(name):
    model, lengths = tiny.model(tiny.CONFIGS[name]), np.array([11, 6, 3])
    tokens = np.where(np.arange(11) < lengths[:, None], np.asarray(tiny.tokens(3, 11)), -1)
    state = _prefill(model, jnp.asarray(np.pad(tokens, ((0, 0), (0, 1)), constant_values=-1)))
    for row, length in enumerate(lengths):
        logits = tiny.run(model, jnp.asarray(tokens[row, :length])).logits[-1]
        assert int(state.last_token[row]) == int(logits.argmax())
    assert state.cache.length.tolist() == lengths.tolist()


@eqx.filter_jit
def _prefill(model, tokens):
    cache = eg.init_cache(model.config, (3,), capacity=12)
    stop = jnp.zeros(0, jnp.int32)
    return sampling.prefill(
        model, tokens, cache, sampler=sampling.Greedy(), stop_tokens=stop, chunk=4
    )


@pytest.mark.parametrize(
    ("name", "layers"), [("gemma3n-e2b", 10), ("gemma3n-e4b", 15), ("gemma4-e2b", 20)]
)
def test_how_many_layers_make_no_keys(name, layers):
    config = eg.variants.get(name)
    assert len(config.layers) - first_without_keys(config) == layers


def _flops(model, tokens, **options) -> float:
    run = jax.jit(lambda model, tokens: model.trunk(tokens, **options)[0])
    return run.lower(model, tokens).compile().cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARING)
def test_layers_that_share_keys_compute_only_what_is_kept(name):
    """Four more layers that share keys cost next to nothing where one token of 64 is kept, and as
    much again as the first four where all are.
    """
    few = tiny.CONFIGS[name]
    more = few.with_layers([0, 1, 2, 3, 2, 3, 2, 3])
    tokens = tiny.tokens(64)

    def added(**options):
        small, large = (
            eqx.filter_eval_shape(eg.Transformer, c, key=jax.random.key(0)) for c in (few, more)
        )
        return _flops(large, tokens, **options) - _flops(small, tokens, **options)

    assert added(keep=jnp.asarray([63])) < 0.1 * added()


def test_capture_sees_all_tokens_where_keys_are_made_and_those_kept_behind():
    model = tiny.model(tiny.GEMMA4_SMALL)
    tokens = tiny.tokens(LENGTH)

    def lengths(**options):
        paths = [f"layers.{index}.ffw" for index in range(4)]

        def results(model):
            _, calls = interpret.capture(lambda m: m.trunk(tokens, **options), model, paths)
            return [call.result for call in calls]

        return [result.shape[0] for result in eqx.filter_eval_shape(results, model)]

    assert lengths() == [LENGTH] * 4
    assert lengths(keep=[LENGTH - 1]) == [LENGTH, LENGTH, 1, 1]


def test_indices_that_do_not_fit_are_named():
    model = tiny.model(tiny.GEMMA3)
    with pytest.raises(ValueError, match="`keep` must hold indices of 7 tokens, 0 to 6; got"):
        model.trunk(tiny.tokens(LENGTH), keep=[LENGTH])
    with pytest.raises(ValueError, match="`keep` must have the batch of `tokens`"):
        model.trunk(tiny.tokens(2, LENGTH), keep=[0, 1])
