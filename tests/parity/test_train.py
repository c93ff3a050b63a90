"""Training here and with `transformers` and torch: the same gradients, the same losses.

Weights are handed over as in `test_transformers.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from equigemma import train


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from parity.test_transformers import CASES, LENGTH, build, config_of, give, weights_of  # noqa: E402


ROWS, STEPS, RATE = 3, 20, 1e-3
NAMES = ["gemma1, a key head for all", "gemma2", "gemma3"]


@pytest.fixture(autouse=True, scope="module")
def promotion():
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        yield


def pair(name: str):
    """Their model and ours with the same random weights, of a size that training begins with."""
    theirs = build(CASES[name]()).train()
    ours = jax.tree.map(lambda leaf: leaf * 0.3, tiny.model(config_of(theirs.config)))
    give(ours, theirs)
    return theirs, ours


def batch(seed: int) -> train.Batch:
    """Rows of one text each, of whose beginnings nothing is learned."""
    rng = np.random.default_rng(seed)
    texts = [
        train.Example(rng.integers(3, 61, LENGTH), np.arange(LENGTH) >= given)
        for given in rng.integers(0, LENGTH - 2, ROWS)
    ]
    return next(train.pack(texts, length=LENGTH, rows=ROWS))


def their_loss(model, batch: train.Batch):
    tokens, targets, weights = (
        torch.tensor(np.asarray(leaf)) for leaf in (batch.tokens, batch.targets, batch.weights)
    )
    logits = model(input_ids=tokens, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.long().flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


def mean_loss(model, batch: train.Batch):
    total, weight = train.next_token_loss(model, batch, chunk=13)
    return total / weight


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_torch(name):
    theirs, ours = pair(name)
    data = batch(0)
    loss = their_loss(theirs, data)
    loss.backward()
    value, gradient = jax.jit(jax.value_and_grad(mean_loss))(ours, data)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    named = dict(theirs.named_parameters())
    compared = 0
    for key, grad in jax.jit(weights_of)(gradient).items():
        if key in named:
            # Float32 sums in another order; grads reach 1.
            np.testing.assert_allclose(grad, named[key].grad.numpy(), atol=1e-5, err_msg=key)
            compared += 1
    assert compared == len(named)


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_adamw_are_those_of_torch_step_by_step(name):
    theirs, ours = pair(name)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=RATE, weight_decay=0.1)
    expected = []
    for number in range(STEPS):
        loss = their_loss(theirs, batch(number % 3))
        their_optimizer.zero_grad()
        loss.backward()
        their_optimizer.step()
        expected.append(loss.item())

    optimizer = optax.adamw(RATE, weight_decay=0.1)
    state, losses = train.init(ours, optimizer), []
    step = train.make_step(train.next_token_loss, optimizer)
    for number in range(STEPS):
        state, metrics = step(state, batch(number % 3))
        losses.append(float(metrics.loss))
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cross_entropy_is_that_of_torch(softcap, smoothing):
    hidden, table = tiny.normal(1, 23, 7), tiny.normal(2, 61, 7)
    targets = np.random.default_rng(3).integers(0, 61, 23)

    def ours(hidden, table):
        return train.cross_entropy_sum(
            hidden,
            table,
            jnp.asarray(targets, jnp.int32),
            jnp.ones(23),
            softcap=softcap,
            label_smoothing=smoothing,
            chunk=5,
        )

    value, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, table)
    x, w = (torch.tensor(np.asarray(leaf), requires_grad=True) for leaf in (hidden, table))
    logits = x @ w.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = torch.nn.functional.cross_entropy(
        logits, torch.tensor(targets), reduction="sum", label_smoothing=smoothing
    )
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    for grad, leaf in zip(grads, (x, w), strict=True):
        np.testing.assert_allclose(grad, leaf.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_dpo_loss_and_gradients_are_those_of_torch(name, length_normalized):
    theirs, ours = pair(name)
    reference = tiny.normal(5, ROWS, 2)
    pairs = train.PreferenceBatch(batch(1), batch(2), reference)
    gains = []
    for side, data in enumerate((pairs.chosen, pairs.rejected)):
        tokens, targets, weights = (
            torch.tensor(np.asarray(leaf)) for leaf in (data.tokens, data.targets, data.weights)
        )
        # From their logits on, in float64.
        log_p = theirs(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)
        chosen = log_p.gather(-1, targets.long()[..., None])[..., 0]
        gain = (chosen * weights).sum(-1) - torch.tensor(np.asarray(reference[:, side]))
        gains.append(gain / weights.sum(-1) if length_normalized else gain)
    loss = -torch.nn.functional.logsigmoid(0.7 * (gains[0] - gains[1])).mean()
    loss.backward()

    def mean(model):
        options = {"beta": 0.7, "length_normalized": length_normalized}
        total, count = train.dpo_loss(model, pairs, **options, chunk=13)
        return total / count

    value, gradient = jax.jit(jax.value_and_grad(mean))(ours)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    named = dict(theirs.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in named.values())
    compared = 0
    for key, grad in jax.jit(weights_of)(gradient).items():
        if key in named:
            # Float32 sums in another order, of grads as large as the largest.
            expected = named[key].grad.numpy()
            np.testing.assert_allclose(grad, expected, atol=1e-5 * max(largest, 1), err_msg=key)
            compared += 1
    assert compared == len(named)
