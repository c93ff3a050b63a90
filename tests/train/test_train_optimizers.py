"""Steps on optax: whatever the transformation, they are those of the loop in optax's own pages."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from optax import contrib

from equigemma import train


STEPS, ROWS = 6, 6
KEY = jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def promotion():
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        yield


class Network(eqx.Module):
    """Arrays of one, two and three axes; it can be called, as every model can."""

    inner: jax.Array
    outer: jax.Array
    bias: jax.Array
    scale: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(jnp.einsum("bd,cdh->bch", x, self.inner))
        return self.scale[0] * jnp.einsum("bch,ch->b", hidden, self.outer) + self.bias.sum()


NETWORK = Network(
    tiny.normal(1, 2, 5, 7), tiny.normal(2, 2, 7), tiny.normal(3, 3), tiny.normal(4, 1)
)
BATCHES = [
    (tiny.normal(10 + step, ROWS, 5), tiny.normal(20 + step, ROWS), jnp.arange(1.0, 1.0 + ROWS))
    for step in range(STEPS)
]


def loss(model, batch):
    x, y, weights = batch
    return jnp.sum(weights * jnp.square(model(x) - y)), weights.sum()


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def kinds(params):
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", params)


def accumulated(k):
    return optax.MultiSteps(optax.adam(0.01), k)


OPTIMIZERS = {
    **{
        name: partial(getattr(optax, name), 0.01)
        for name in (
            "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage "
            "lamb lars lion nadam nadamw novograd optimistic_adam_v2 optimistic_gradient_descent "
            "radam rmsprop rprop sgd sign_sgd sm3 yogi"
        ).split()
        if hasattr(optax, name)  # older versions have fewer
    },
    **{
        name: partial(getattr(contrib, name), 0.01)
        for name in (
            "acprop ademamix adopt dadapt_adamw galore madgrad muon prodigy schedule_free_adamw "
            "schedule_free_sgd simplified_ademamix"
        ).split()
        if hasattr(contrib, name)
    },
    "noisy_sgd": lambda: optax.noisy_sgd(0.01, key=KEY),
    "momentum": lambda: optax.sgd(0.01, momentum=0.9, nesterov=True),
    "mu_dtype": lambda: optax.adamw(0.01, mu_dtype=jnp.bfloat16),
    "cocob": contrib.cocob,
    "dog": contrib.dog,
    "dowg": contrib.dowg,
    "mechanize": lambda: contrib.mechanize(optax.adam(0.01)),
    "schedule": lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 5), weight_decay=0.1),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(0.01),
    "injected schedule": lambda: optax.inject_hyperparams(optax.sgd)(
        optax.linear_schedule(0.1, 0.0, 4)
    ),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-0.1)
    ),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(0.2)), ("sgd", optax.sgd(0.1))),
    "centralize": lambda: optax.chain(optax.centralize(), optax.sgd(0.1)),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.sgd(0.1)),
    "ema": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "apply_every": lambda: optax.chain(optax.sgd(0.1), optax.apply_every(2)),
    "keep_params_nonnegative": lambda: optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative()),
    "flatten": lambda: optax.flatten(optax.adam(0.01)),
    "MultiSteps": lambda: accumulated(2),
    "MultiSteps as a transformation": lambda: accumulated(3).gradient_transformation(),
    "MultiSteps of a plateau": lambda: optax.MultiSteps(
        optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1)), 2
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.01), 2),
    "conditionally_transform": lambda: optax.chain(
        optax.conditionally_transform(optax.trace(0.9), lambda step: jnp.mod(step, 2) == 0),
        optax.sgd(0.01),
    ),
    "conditionally_mask": lambda: optax.conditionally_mask(
        optax.sgd(0.1), lambda step, **extra: extra["value"] > 1.0, forward_extra_args=True
    ),
    "masked": lambda: optax.masked(optax.adam(0.01), matrices),
    "masked by a tree": lambda: optax.masked(optax.adam(0.01), matrices(NETWORK_ARRAYS)),
    "decay of matrices": lambda: optax.adamw(0.01, mask=matrices(NETWORK_ARRAYS)),
    "multi_transform": lambda: optax.multi_transform(
        {"matrix": optax.adam(0.01), "vector": optax.set_to_zero()}, kinds
    ),
    "freeze": lambda: optax.chain(optax.sgd(0.1), optax.freeze(matrices(NETWORK_ARRAYS))),
    "monitor": lambda: optax.chain(
        optax.sgd(0.1), optax.monitor({"norm": lambda updates: optax.tree.norm(updates)})
    ),
    "lookahead": lambda: optax.lookahead(optax.adam(0.01), 2, 0.5),
    "lookahead that forgets": lambda: optax.lookahead(optax.adam(0.01), 2, 0.5, reset_state=True),
    "sam": lambda: contrib.sam(optax.adam(0.01), perturbation()),
    "sam after a clip": lambda: optax.chain(
        optax.clip(1.0), contrib.sam(optax.sgd(0.01), perturbation())
    ),
    "opaque sam": lambda: contrib.sam(optax.adam(0.01), perturbation(), opaque_mode=True),
    "sophia": lambda: contrib.sophia(0.01, update_interval=2),
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(0.1), contrib.reduce_on_plateau(patience=1)
    ),
    "polyak_sgd": optax.polyak_sgd,
    "momo": contrib.momo,
    "momo_adam": contrib.momo_adam,
    "lbfgs": lambda: optax.lbfgs(memory_size=3),
    "lbfgs without a search": lambda: optax.lbfgs(1e-4, memory_size=3, linesearch=None),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=9)
    ),
    "backtracking with its gradient": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(9, store_grad=True)
    ),
    "zoom": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_zoom_linesearch(max_linesearch_steps=9)
    ),
}
NETWORK_ARRAYS = eqx.filter(NETWORK, eqx.is_inexact_array)

for name in ("freeze", "monitor"):
    if not hasattr(optax, name):  # older versions
        del OPTIMIZERS[name]

# What their pages tell to pass; the others take nothing, and refuse it if they are given it.
VALUES = {"reduce_on_plateau", "MultiSteps of a plateau", "polyak_sgd", "momo", "momo_adam"}
VALUES |= {"conditionally_mask"}
SEARCHES = {"lbfgs", "backtracking", "backtracking with its gradient", "zoom"}


def perturbation():
    return optax.chain(contrib.normalize(), optax.sgd(0.1))


def extra_of(name):
    """As `make_step` takes it: what it does not pass of its own accord."""
    return {
        "sophia": lambda mean_loss: {"obj_fn": mean_loss},
        "opaque sam": lambda mean_loss: {"grad_fn": lambda p, i: jax.grad(mean_loss)(p)},
    }.get(name, lambda mean_loss: {})


def plain_loop(name, loss, model, batches, params_of=lambda params: params):
    """The loop that optax's pages show: value and gradient, update, `apply_updates`."""
    optimizer = OPTIMIZERS[name]()
    params, frozen = eqx.partition(model, eqx.is_inexact_array)
    pair = name.startswith("lookahead")
    params = optax.LookaheadParams.init_synced(params) if pair else params
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        def mean(params):
            total, weight = loss(eqx.combine(params, frozen), batch)
            return total / weight

        value, gradient = jax.value_and_grad(mean)(params.fast if pair else params)
        extra = extra_of(name)(mean)
        if name in VALUES | SEARCHES:
            extra["value"] = value
        if name in SEARCHES:
            extra |= {"grad": gradient, "value_fn": mean}
        updates, state = optimizer.update(gradient, state, params, **extra)
        return optax.apply_updates(params, updates), state, value

    values = []
    for batch in batches:
        params, state, value = step(params, state, batch)
        values.append(float(value))
    return params, state, values


def our_steps(name, loss, model, batches, **options):
    optimizer = OPTIMIZERS[name]()
    pair = name.startswith("lookahead")
    state = train.init(optax.LookaheadParams.init_synced(model) if pair else model, optimizer)
    step = train.make_step(loss, optimizer, extra_args=extra_of(name), **options)
    values = []
    for batch in batches:
        state, metrics = step(state, batch)
        assert metrics.finite
        values.append(float(metrics.loss))
    return state, step, values


def assert_alike(ours, expected, rtol=2e-5, atol=1e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for our, leaf in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        assert our.dtype == leaf.dtype and our.shape == leaf.shape
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            our, leaf = jax.random.key_data(our), jax.random.key_data(leaf)
        wide = [np.asarray(array, np.float64) for array in (our, leaf)]
        np.testing.assert_allclose(*wide, rtol=rtol, atol=atol)


def assert_same(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for our, leaf in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_array_equal(our, leaf)


def snapshot(state):
    """What training changes, as numpy's own arrays: a step takes those of the state."""

    def own(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(own, (state.model, state.optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_plain_loop(name):
    params, optimizer_state, expected = plain_loop(name, loss, NETWORK, BATCHES)
    state, step, values = our_steps(name, loss, NETWORK, BATCHES)
    # The same formulas in float32, in other fusions: parameters are of size 1.
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert_alike(state.model, params)
    assert_alike(state.optimizer, optimizer_state)

    # A step that is not finite keeps the state, bit for bit.
    before = snapshot(state)
    x, y, weights = BATCHES[1]
    state, metrics = step(state, (x.at[0, 0].set(jnp.nan), y, weights))
    assert not metrics.finite
    assert_same(snapshot(state), before)
    assert step(state, BATCHES[1])[1].finite


def transformer_batches():
    rng = np.random.default_rng(0)
    texts = [train.Example(rng.integers(0, tiny.VOCAB, 9), np.ones(9)) for _ in range(8 * 4)]
    return list(train.pack(texts, length=9, rows=4))[:5]


TRANSFORMER = tiny.model(tiny.model_config(tiny.layer(qk_norm=True)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["adamw", "muon", "multi_transform", "lookahead", "sam after a clip", "reduce_on_plateau"],
)
def test_steps_of_a_transformer_are_those_of_the_plain_loop(name):
    batches = transformer_batches()
    params, _, expected = plain_loop(name, train.next_token_loss, TRANSFORMER, batches)
    state, _, values = our_steps(name, train.next_token_loss, TRANSFORMER, batches)
    # Float32 sums in other fusions; the loss is near 3, parameters near 1.
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert_alike(state.model, params, atol=3e-5)


def seen_arguments(**options):
    """The extra arguments of one step, and the updates it begins with."""
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(updates=updates, at_params=extra["value_fn"](params), params=params, **extra)
        seen["value_fn gradient"] = jax.grad(extra["value_fn"])(params)
        return jax.tree.map(jnp.zeros_like, updates), (
            updates,
            seen["grad"],
            seen["value_fn gradient"],
        ) + (
            extra["value"],
            seen["at_params"],
        )

    def init(params):
        scalar = jnp.zeros(())
        return params, params, params, scalar, scalar

    optimizer = optax.GradientTransformationExtraArgs(init, update)
    state = train.init(NETWORK, optimizer)
    kept: Any = train.make_step(loss, optimizer, **options)(state, BATCHES[0])[0].optimizer
    return kept


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_extra_arguments_are_those_of_the_mean_loss(micro_batches):
    def mean(model):
        total, weight = loss(model, BATCHES[0])
        return total / weight

    value, gradient = jax.value_and_grad(mean)(NETWORK)
    norm = optax.tree.norm(gradient)
    assert norm > 0.5
    updates, grad, from_value_fn, given, at_params = seen_arguments(
        max_grad_norm=0.5, micro_batches=micro_batches
    )
    # Sums of six squares in another order.
    for found in (given, at_params):
        np.testing.assert_allclose(found, value, rtol=1e-6)
    for found, expected in (
        (grad, gradient),
        (from_value_fn, gradient),
        (updates, jax.tree.map(lambda leaf: leaf * 0.5 / norm, gradient)),
    ):
        assert_alike(found, expected, rtol=1e-5, atol=1e-6)


def broken_at(step):
    """A learning rate that is not a number from some step on."""
    return lambda count: jnp.where(count < step, 0.1, jnp.nan)


@pytest.mark.parametrize(
    "make",
    [
        optax.sgd,
        optax.adamw,
        optax.adafactor,
        lambda rate: optax.apply_if_finite(optax.adam(rate), 2),
        lambda rate: optax.chain(optax.sgd(1.0), optax.scale_by_schedule(rate)),
    ],
)
@pytest.mark.parametrize("last", [0, 2])
def test_an_update_that_is_not_finite_keeps_the_state(make, last):
    optimizer = make(broken_at(last))
    state = train.init(NETWORK, optimizer)
    step = train.make_step(loss, optimizer)
    for batch in BATCHES[:last]:
        state, metrics = step(state, batch)
        assert metrics.finite
    before = snapshot(state)
    state, metrics = step(state, BATCHES[last])
    assert np.isfinite(metrics.loss) and np.isfinite(metrics.gradient_norm)
    assert not metrics.finite
    assert_same(snapshot(state), before)


def test_a_weight_that_overflows_its_dtype_is_not_finite():
    model = {"a": jnp.full(19, 60_000, jnp.float16), "b": jnp.zeros(2, jnp.float16)}
    optimizer = optax.sgd(1.0)
    state = train.init(model, optimizer)

    def loss(model, factor):
        return model["a"][17].astype(jnp.float32) * factor, 1.0

    # The update is 6,000, and float16 ends at 65,504.
    state, metrics = train.make_step(loss, optimizer)(state, jnp.float32(-6000))
    assert np.isfinite(metrics.loss) and metrics.gradient_norm == 6000
    assert not metrics.finite
    assert (state.model["a"] == 60_000).all()


def test_infinities_that_no_update_makes_are_let_be():
    """A mask of −∞ is an array of floats like any weight."""
    mask = jnp.array([0.0, -jnp.inf, 0.0])
    model = {"mask": mask, "logits": jnp.array([1.0, 2.0, 3.0])}

    def loss(model, target):
        return -jax.nn.log_softmax(model["logits"] + model["mask"])[target], 1.0

    optimizer = optax.adam(0.1)
    state = train.init(model, optimizer)
    state, metrics = train.make_step(loss, optimizer)(state, jnp.array(0))
    assert metrics.finite
    assert state.model["mask"][1] == -jnp.inf
    assert state.model["logits"][0] > 1.0


def test_what_an_optimizer_keeps_of_its_arguments_is_kept_by_a_broken_step():
    """Gradients and parameters stored as they came, one of them twice, and a literal."""

    def update(updates, state, params=None):
        return updates, (updates, params, params, jnp.float32(3))

    optimizer = optax.GradientTransformation(lambda p: (p, p, p, jnp.float32(5)), update)
    state = train.init(NETWORK, optimizer)
    step = train.make_step(loss, optimizer)
    x, y, weights = BATCHES[0]
    before = snapshot(state)
    state, _ = step(state, (x * jnp.nan, y, weights))
    assert_same(snapshot(state), before)
    state, _ = step(state, BATCHES[0])
    stored: Any = state.optimizer
    assert_same(stored[1:], (NETWORK, NETWORK, jnp.float32(3)))


def test_an_update_with_side_effects_runs_once():
    calls = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda norm: calls.append(float(norm)), optax.tree.norm(updates))
        return jax.tree.map(lambda leaf: -0.1 * leaf, updates), state

    optimizer = optax.GradientTransformation(lambda params: (), update)
    state = train.init(NETWORK, optimizer)
    state, metrics = train.make_step(loss, optimizer)(state, BATCHES[0])
    jax.effects_barrier()
    assert len(calls) == 1
    np.testing.assert_allclose(calls[0], metrics.gradient_norm, rtol=1e-6)  # float32 sums


def test_a_state_has_arrays_of_its_own():
    key = jax.random.key(3)
    for optimizer in (
        contrib.sam(optax.sgd(0.01), perturbation()),
        contrib.schedule_free_sgd(0.01),
        optax.noisy_sgd(0.01, key=key),
    ):
        state = train.init(NETWORK, optimizer)
        leaves = jax.tree.leaves((state.model, state.optimizer, NETWORK))
        assert len({id(leaf) for leaf in leaves}) == len(leaves)
        train.make_step(loss, optimizer)(state, BATCHES[0])
        assert not any(leaf.is_deleted() for leaf in (key, *jax.tree.leaves(NETWORK)))


def test_leaves_that_are_no_arrays_stay_as_they_are():
    class Model(eqx.Module):
        network: Network
        activation: object
        name: str

    def wrapped(model, batch):
        assert model.name == "it"
        x, y, weights = batch
        return jnp.sum(weights * jnp.square(model.activation(model.network(x)) - y)), 1.0

    optimizer = optax.sgd(0.001)
    state = train.init(Model(NETWORK, jnp.tanh, "it"), optimizer)
    step = train.make_step(wrapped, optimizer)
    values = []
    for _ in range(3):
        state, metrics = step(state, BATCHES[0])
        values.append(float(metrics.loss))
    assert values[2] < values[0]
    assert train.merge(state).activation is jnp.tanh


def test_labels_and_masks_by_path():
    labels = train.param_labels(lambda path, leaf: path.startswith("layers.0.") and leaf.ndim > 1)
    tree = labels(TRANSFORMER)
    assert tree.layers[0].attention.output.weight is True
    assert tree.embedding.weight is False and tree.layers[0].pre_attention_norm.scale is False
    optimizer = optax.multi_transform({True: optax.sgd(0.1), False: optax.set_to_zero()}, labels)
    state = train.init(TRANSFORMER, optimizer)
    state, _ = train.make_step(train.next_token_loss, optimizer)(state, transformer_batches()[0])
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.model, TRANSFORMER)
    assert jax.tree.leaves(changed) == jax.tree.leaves(tree)


def used_state():
    state = train.init(NETWORK, optax.sgd(0.1))
    train.make_step(loss, optax.sgd(0.1))(state, BATCHES[0])
    return state


def step_of(loss=loss, **options):
    return train.make_step(loss, optax.sgd(0.1), **options)(
        train.init(NETWORK, optax.sgd(0.1)), BATCHES[0]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train.merge(used_state()), "A step has taken over the arrays of this state"),
        (
            lambda: train.make_step(loss, optax.sgd(0.1))(used_state(), BATCHES[0]),
            "Go on with the state it returned: `state, metrics = step",
        ),
        (
            lambda: step_of(lambda model, batch: loss(model, batch)[0]),
            r"two scalars, .* got float32\[\]. Where it returns a mean, return \(mean, 1.0\)",
        ),
        (
            lambda: step_of(lambda model, batch: (batch[0], 1.0)),
            r"got \(float32\[6, 5\], float\)",
        ),
        (lambda: step_of(lambda model, batch: None), "two scalars, .* got NoneType"),
        (lambda: step_of(micro_batches=4), r"micro_batches=4 must divide .* shape \[6, 5\]"),
        (lambda: step_of(micro_batches=0), "micro_batches must be at least 1, got 0"),
        (lambda: step_of(max_grad_norm=0.0), "max_grad_norm must be a number above 0"),
        (
            lambda: step_of(max_grad_norm=float("nan")),
            "max_grad_norm must be a number above 0.* got nan",
        ),
        (
            lambda: train.init(NETWORK, optax.lookahead(optax.sgd(0.1), 2, 0.5)),
            r"pass optax.LookaheadParams.init_synced\(model\) in place of the model",
        ),
        (
            lambda: train.init(
                NETWORK, optax.multi_transform({"matrix": optax.sgd(0.1)}, kinds(NETWORK))
            ),
            "optax has called a tree of labels .* `lambda params: labels`, or train.param_labels",
        ),
        (
            lambda: train.init(
                TRANSFORMER, optax.multi_transform({"matrix": optax.sgd(0.1)}, kinds(TRANSFORMER))
            ),
            "optax has called a tree of labels .* `lambda params: labels`, or train.param_labels",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert len(str(error.value).splitlines()) == 1
