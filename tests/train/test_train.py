"""Losses, packing and steps, against plain formulas, other ways of batching, and torch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hlo import compilations

from equigemma import train
from equigemma.train import Example, _cross_entropy, _next_token


MODEL = tiny.model(tiny.GEMMA3)
KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN = jax.random.normal(KEYS[0], (2, 13, 7))
TABLE = jax.random.normal(KEYS[1], (31, 7))
TARGETS = jax.random.randint(KEYS[2], (2, 13), 0, 31)
WEIGHTS = jax.random.uniform(KEYS[3], (2, 13)).at[0, :5].set(0)


@pytest.fixture(autouse=True, scope="module")
def promotion():
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        yield


def plain(hidden, table, softcap, smoothing, z_loss):
    """The textbook formula, all logits at once."""
    logits = hidden @ table.T
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0]
    loss = -(1 - smoothing) * chosen - smoothing * log_p.mean(-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum((loss + z_loss * jnp.square(log_z)) * WEIGHTS)


OPTIONS = [(None, 0.0, 0.0), (3.0, 0.1, 0.01), (None, 0.2, 0.0), (2.0, 0.0, 0.1)]


@pytest.mark.parametrize("chunk", [1, 5, 26, 1000])
@pytest.mark.parametrize(("softcap", "smoothing", "z_loss"), OPTIONS)
def test_chunked_loss_and_gradients_are_those_of_the_plain_formula(
    softcap, smoothing, z_loss, chunk
):
    def chunked(hidden, table):
        options = {"softcap": softcap, "label_smoothing": smoothing, "z_loss": z_loss}
        return 1.7 * train.cross_entropy_sum(
            hidden, table, TARGETS, WEIGHTS, chunk=chunk, **options
        )

    value, grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(HIDDEN, TABLE)
    expected, expected_grads = jax.value_and_grad(
        lambda *x: 1.7 * plain(*x, softcap, smoothing, z_loss), (0, 1)
    )(HIDDEN, TABLE)
    # Sums of 26 terms of size 10 in float32, in another order.
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, reference in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, reference, atol=1e-5)


@pytest.mark.parametrize(("softcap", "smoothing", "z_loss"), OPTIONS)
def test_blocks_of_words_add_up(monkeypatch, softcap, smoothing, z_loss):
    monkeypatch.setattr(_cross_entropy, "LARGEST_BLOCK", 16)
    # Three blocks; the largest logit by far, about 100, is in the second.
    table = jnp.concatenate([TABLE, TABLE[:2]]).at[20].set(100 * HIDDEN[1, 1] / 7)
    assert _cross_entropy._block(len(table)) == 11

    def blocks(hidden, table):
        options = {"softcap": softcap, "label_smoothing": smoothing, "z_loss": z_loss}
        return train.cross_entropy_sum(hidden, table, TARGETS, WEIGHTS, chunk=5, **options)

    value, grads = jax.jit(jax.value_and_grad(blocks, (0, 1)))(HIDDEN, table)
    expected, expected_grads = jax.value_and_grad(
        lambda *x: plain(*x, softcap, smoothing, z_loss), (0, 1)
    )(HIDDEN, table)
    # Sums of 26 terms of size 100 in float32, in another order.
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, reference in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, reference, rtol=1e-5, atol=1e-4)


def in_float64(hidden, table, softcap, smoothing, z_loss) -> float:
    """The formula once more, in numpy."""
    logits = hidden.reshape(-1, 7) @ table.T
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    log_z = np.log(np.exp(logits).sum(-1))
    chosen = logits[np.arange(26), np.asarray(TARGETS).ravel()]
    loss = log_z - (1 - smoothing) * chosen - smoothing * logits.mean(-1) + z_loss * log_z**2
    return (loss * np.asarray(WEIGHTS, np.float64).ravel()).sum()


@pytest.mark.parametrize(("softcap", "smoothing", "z_loss"), OPTIONS)
def test_gradients_of_the_loss_by_finite_differences(softcap, smoothing, z_loss):
    def loss(hidden, table):
        options = {"softcap": softcap, "label_smoothing": smoothing, "z_loss": z_loss}
        return train.cross_entropy_sum(hidden, table, TARGETS, WEIGHTS, chunk=5, **options)

    grads = jax.jit(jax.grad(loss, (0, 1)))(HIDDEN, TABLE)
    at = [np.array(array, np.float64) for array in (HIDDEN, TABLE)]
    step = 1e-4
    for number, grad in enumerate(grads):
        changes = np.zeros(at[number].shape)
        for index in np.ndindex(changes.shape):
            ends = []
            for sign in (1, -1):
                moved = [array.copy() for array in at]
                moved[number][index] += sign * step
                ends.append(in_float64(*moved, softcap, smoothing, z_loss))
            changes[index] = (ends[0] - ends[1]) / (2 * step)
        # The error of a central difference is of order step², 1e-8; grads of float32 reach 10.
        np.testing.assert_allclose(grad, changes, rtol=1e-5, atol=1e-5)


def test_a_frozen_table_costs_no_gradient():
    def loss(hidden, table):
        return train.cross_entropy_sum(hidden, table, TARGETS, WEIGHTS, chunk=5)

    frozen = str(jax.make_jaxpr(jax.grad(loss))(HIDDEN, TABLE))
    trained = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(HIDDEN, TABLE))
    assert frozen.count("dot_general") == 2
    assert trained.count("dot_general") == 3


def test_logits_of_a_whole_batch_never_exist(monkeypatch):
    # As with a real vocabulary, which is many blocks.
    monkeypatch.setattr(_cross_entropy, "LARGEST_BLOCK", 512)
    hidden, table = jnp.zeros((8192, 16)), jnp.zeros((4096, 16))
    targets, weights = jnp.zeros(8192, jnp.int32), jnp.ones(8192)

    def loss(hidden, table):
        return train.cross_entropy_sum(hidden, table, targets, weights, chunk=256)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile()
    # One array of a chunk's logits, and few of a block; the whole logits would be 32 of a chunk.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 256 * 4096 * 4


def example(size: int, seed: int, learned: int = 0) -> Example:
    tokens = np.asarray(tiny.tokens(size, seed=seed)).tolist()
    return Example(tokens, [float(index >= learned) for index in range(size)])


def test_packing_keeps_order_and_splits_nothing_that_fits():
    examples = [example(size, seed=size) for size in (5, 4, 2, 7, 3)]
    batches = list(train.pack(examples, length=8, rows=2))
    segments = [batch.segments.tolist() for batch in batches]
    assert segments == [
        [[0] * 5 + [1] * 2 + [-1], [0] * 4 + [-1] * 4],
        [[0] * 7 + [-1], [0] * 3 + [-1] * 5],
    ]
    first = batches[0]
    assert first.tokens[0, :7].tolist() == [*examples[0].tokens, *examples[2].tokens]
    assert first.positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, -1]
    assert first.targets[0, :4].tolist() == examples[0].tokens[1:]
    assert first.weights[0].tolist() == [1, 1, 1, 1, 0, 1, 0, 0]


def test_a_long_example_is_cut_and_a_prompt_is_not_learned():
    (batch,) = train.pack([example(11, seed=1, learned=4)], length=6, rows=2)
    # The second chunk begins with the last token of the first, which so has a successor too.
    assert batch.weights.tolist() == [[0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0]]


@eqx.filter_jit
def loss_of(model, batch):
    return train.next_token_loss(model, batch)


def test_packed_texts_cost_what_they_cost_alone():
    examples = [example(size, seed=size, learned=size // 3) for size in (5, 11, 2, 7)]
    (together,) = train.pack(examples, length=14, rows=2)
    alone = [next(train.pack([single], length=14, rows=2)) for single in examples]
    total, weight = loss_of(MODEL, together)
    parts = [loss_of(MODEL, batch) for batch in alone]
    assert weight == sum(part[1] for part in parts)
    # The same terms, summed in another order.
    np.testing.assert_allclose(total, sum(part[0] for part in parts), rtol=1e-5)


def test_no_gradient_flows_between_texts_of_a_row(monkeypatch):
    (batch,) = train.pack([example(6, seed=1), example(7, seed=2)], length=13, rows=1)
    second_only = eqx.tree_at(
        lambda b: b.weights, batch, jnp.where(batch.segments == 1, batch.weights, 0.0)
    )

    def grad(rows):
        # What is looked up is given, so that its gradient is that of the rows alone.
        monkeypatch.setattr(_next_token, "tied_lookup", lambda table, tokens: (rows, table))
        return train.next_token_loss(MODEL, second_only)[0]

    grads = jax.jit(jax.grad(grad))(MODEL.embedding.weight[batch.tokens])
    assert np.abs(grads[0, :6]).max() == 0
    assert np.abs(grads[0, 6:12]).min(axis=0).max() > 0


def batches(count: int, rows: int = 4):
    return [
        next(
            train.pack(
                [example(9, seed=100 * index + row) for row in range(rows)], length=9, rows=rows
            )
        )
        for index in range(count)
    ]


def run(step, state, given):
    losses = []
    for batch in given:
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    return state, losses


@pytest.mark.slow
def test_training_learns_a_batch_by_heart():
    optimizer = optax.adam(0.02)
    state = train.init(MODEL, optimizer)
    step = train.make_step(train.next_token_loss, optimizer)
    _, losses = run(step, state, batches(1) * 60)
    assert losses[0] > 2.5
    assert losses[-1] < 0.3


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))
    whole = train.make_step(train.next_token_loss, optimizer)
    parts = train.make_step(train.next_token_loss, optimizer, micro_batches=2)
    (batch,) = batches(1)
    # Uneven weights: a mean of means would differ from the mean over all targets.
    batch = eqx.tree_at(lambda b: b.weights, batch, batch.weights.at[0, 2:].set(0))
    one, metrics = whole(train.init(MODEL, optimizer), batch)
    two, metrics_of_parts = parts(train.init(MODEL, optimizer), batch)
    np.testing.assert_allclose(metrics.loss, metrics_of_parts.loss, rtol=1e-6)
    for left, right in zip(jax.tree.leaves(one.model), jax.tree.leaves(two.model), strict=True):
        # One update of size 0.5 from gradients that differ by rounding.
        np.testing.assert_allclose(left, right, atol=2e-6)


def test_only_what_is_trainable_changes_and_the_model_stays_usable():
    def is_norm(path, leaf):
        return "norm" in jax.tree_util.keystr(path)

    chosen = jax.tree_util.tree_map_with_path(is_norm, MODEL)
    optimizer = optax.sgd(0.1)
    before = train.init(MODEL, optimizer, trainable=chosen)
    step = train.make_step(train.next_token_loss, optimizer)
    state, _ = step(before, batches(1)[0])
    changed = jax.tree.map(lambda new, old: bool((new != old).any()), train.merge(state), MODEL)
    assert jax.tree.leaves(changed) == jax.tree.leaves(chosen)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(MODEL))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.model))


def test_memory_of_a_model_from_a_file_is_not_kept_beside_that_of_the_state():
    """JAX takes aligned arrays of numpy as they are, and cannot give their memory to a result."""
    stored = [np.zeros(leaf.size + 16, leaf.dtype) for leaf in jax.tree.leaves(MODEL)]
    views = [
        array[-array.ctypes.data % 64 // array.itemsize :][: leaf.size].reshape(leaf.shape)
        for array, leaf in zip(stored, jax.tree.leaves(MODEL), strict=True)
    ]
    leaves = [jax.device_put(view) for view in views]
    for leaf, view in zip(leaves, views, strict=True):
        assert leaf.unsafe_buffer_pointer() == view.ctypes.data
    model = jax.tree.unflatten(jax.tree.structure(MODEL), leaves)
    optimizer = optax.sgd(0.1)
    before = train.init(model, optimizer)
    buffers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(before.model)}
    assert not buffers & {view.ctypes.data for view in views}
    state, _ = train.make_step(train.next_token_loss, optimizer)(before, batches(1)[0])
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.model)} == buffers


@pytest.mark.slow
def test_one_program_for_batches_of_one_shape():
    """Compiled apart from the first step, to give the compiler's memory back; not once more."""
    step = train.make_step(train.next_token_loss, optax.sgd(0.1))
    state = train.init(MODEL, optax.sgd(0.1))
    counts = []
    with compilations() as made:
        for batch in [*batches(2), *batches(2, rows=2)]:
            before = len(made)
            state, _ = step(state, batch)
            counts.append(len(made) - before)
    assert counts == [1, 0, 1, 0]


@pytest.mark.slow
def test_a_step_without_compiling():
    step = train.make_step(train.next_token_loss, optax.sgd(0.1))
    batch, seen = batches(1)[0], []

    def loss(model, batch):
        total, weight = train.next_token_loss(model, batch)
        seen.append(isinstance(weight, jax.core.Tracer))
        return total, weight

    compiled = step(train.init(MODEL, optax.sgd(0.1)), batch)[1].loss
    with jax.disable_jit():
        plain_step = train.make_step(loss, optax.sgd(0.1))
        value = plain_step(train.init(MODEL, optax.sgd(0.1)), batch)[1].loss
    assert seen == [False]
    np.testing.assert_allclose(value, compiled, rtol=1e-5)  # float32, fused otherwise


def test_a_step_that_is_not_finite_changes_nothing():
    optimizer = optax.adam(0.1)
    state = train.init(MODEL, optimizer)
    step = train.make_step(train.next_token_loss, optimizer)
    (batch,) = batches(1)
    broken = eqx.tree_at(lambda b: b.weights, batch, batch.weights.at[0, 0].set(jnp.nan))
    state, metrics = step(state, broken)
    assert not metrics.finite
    for new, old in zip(jax.tree.leaves(state.model), jax.tree.leaves(MODEL), strict=True):
        np.testing.assert_array_equal(new, old)
    assert step(state, batch)[1].finite


def with_id(name: str, index: int):
    """A batch in which one token or target is another."""
    (batch,) = batches(1)
    array = getattr(batch, name)
    return eqx.tree_at(lambda b: getattr(b, name), batch, array.at[1, 2].set(index))


def short_targets():
    (batch,) = batches(1)
    return eqx.tree_at(lambda b: b.targets, batch, batch.targets[:, :-1])


@pytest.mark.parametrize(("name", "index"), [("tokens", -2), ("tokens", 31), ("targets", -2)])
def test_ids_outside_of_the_vocabulary_make_the_compiled_loss_not_a_number(name, index):
    assert np.isfinite(loss_of(MODEL, with_id(name, 30))[0])
    assert np.isnan(loss_of(MODEL, with_id(name, index))[0])


def test_targets_without_a_weight_may_be_anything():
    for target in (-100, 31, 1000):
        targets = TARGETS.at[0, :5].set(target)
        loss, grad = jax.value_and_grad(train.cross_entropy_sum)(HIDDEN, TABLE, targets, WEIGHTS)
        expected = train.cross_entropy_sum(HIDDEN, TABLE, TARGETS, WEIGHTS)
        assert loss == expected
        assert np.isfinite(grad).all() and not grad[0, :5].any()
    for target in (-1, 31):
        wrong = TARGETS.at[1, 3].set(target)
        assert np.isnan(train.cross_entropy_sum(HIDDEN, TABLE, wrong, WEIGHTS))
        log_p = train.log_probabilities(HIDDEN, TABLE, wrong)
        assert np.isnan(log_p).sum() == 1 and np.isnan(log_p[1, 3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train.init(MODEL, optax.sgd(1.0), trainable=lambda leaf: False), "Nothing is to"),
        (lambda: Example([1, 2], [1.0]), "2 tokens and 1 weights"),
        (lambda: Example([], []), "at least one; got none"),
        (lambda: Example([1.0, 2.0], [1, 1]), "integer token ids, .* got 2 of dtype float64"),
        (lambda: Example([[1, 2], [3, 4]], [1, 1]), "tokens of an example are one row .* 2 axes"),
        (lambda: Example([[1], [3, 4]], [1, 1]), "tokens of an example are one row of numbers"),
        (lambda: Example([1, 2], [[1.0, 1.0]]), "weights of an example are one row .* 2 axes"),
        (lambda: Example([1, 2], ["a", "b"]), "one number as the weight of each token"),
        (lambda: Example([1, -2, 3], [1, 1, 1]), "token 1 of an example is -2"),
        (lambda: Example([1, 2], [1, float("nan")]), "that of token 1 is nan"),
        (lambda: train.next_token_loss(MODEL, with_id("tokens", -2)), "ids from 0 to 30.* from -2"),
        (lambda: train.next_token_loss(MODEL, with_id("tokens", 31)), "ids .* tokens up to 31"),
        (lambda: train.next_token_loss(MODEL, with_id("targets", 31)), "ids .* targets up to 31"),
        (lambda: train.next_token_loss(MODEL, short_targets()), r"one shape; .* targets \[4, 8\]"),
        (
            lambda: train.make_evaluate(train.next_token_loss)(MODEL, iter([])),
            "nothing to evaluate: the batches have no weighted target",
        ),
        (lambda: list(train.pack([], length=1, rows=1)), "at least 2 tokens, got length=1"),
        (
            lambda: train.cross_entropy_sum(HIDDEN, TABLE, TARGETS, WEIGHTS, chunk=0),
            "at least one token, got chunk=0",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
