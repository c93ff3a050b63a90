"""Our model as a part of Linen modules, as `docs/linen.md` says, and in wrappers of DeepMind's."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import optax
import pytest
from flax import linen as nn
from gemma import gm, peft


PAGE = Path(__file__).parents[2] / "docs" / "linen.md"


@pytest.fixture(scope="module")
def page():
    """What the code of the page defines."""
    names = {"__name__": "page"}
    section = PAGE.read_text().split("## A model within a Linen module")[1]
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def models():
    return kinds.models("gemma3")


def assert_close(found, expected, **tolerance):
    found, expected = kinds.flat(found), kinds.flat(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, **tolerance, err_msg=name)


def shapes(tree):
    return {name: (leaf.shape, leaf.dtype) for name, leaf in kinds.flat(tree).items()}


def scorer(model):
    """The page's module around their model, which is a Linen module itself."""

    class Scorer(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            output = model.copy(name="gemma")(tokens, return_hidden_states=True)
            return nn.Dense(1, name="head")(output.hidden_states.mean(axis=-2))

    return Scorer()


def test_a_submodule_is_made_and_trained_as_theirs(page, models):
    theirs, ours, variables = models
    tokens, target = kinds.tokens(), jnp.array([[1.0], [-2.0]])
    modules = scorer(theirs), page.Scorer(ours)
    made = [jax.eval_shape(module.init, jax.random.key(0), tokens) for module in modules]
    assert shapes(made[1]) == shapes(made[0])
    head = {"kernel": jnp.linspace(-1, 1, 12)[:, None], "bias": jnp.zeros(1)}
    start = {"gemma": variables["params"], "head": head}
    optimizer = optax.adam(1e-2)
    trained = []
    for module in modules:

        def loss(params, module=module):
            return jnp.mean((module.apply({"params": params}, tokens) - target) ** 2)

        @jax.jit(compiler_options=kinds.QUICK)
        def step(params, state, loss=loss):
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        params, state, losses = start, optimizer.init(start), []
        for _ in range(5):
            params, state, value = step(params, state)
            losses.append(float(value))
        assert losses[-1] < losses[0]
        trained.append((params, losses))
    np.testing.assert_allclose(trained[1][1], trained[0][1], rtol=1e-4)
    # Adam divides gradients near 0 by their own size: what a sum in another order moved stays.
    assert_close(trained[1][0], trained[0][0], rtol=0, atol=1e-3)


def test_an_initialised_submodule_runs(page, models):
    _, ours, _ = models
    module = page.Scorer(ours)
    variables = jax.jit(module.init, compiler_options=kinds.QUICK)(
        jax.random.key(0), kinds.tokens()
    )
    scores = module.apply(variables, kinds.tokens())
    assert scores.shape == (2, 1) and np.isfinite(scores).all() and np.ptp(scores) > 0


def test_their_policy_with_an_anchor_and_dpo(page, models):
    theirs, ours, variables = models
    other = jax.tree.map(lambda leaf: leaf * 1.3, variables["params"])
    params = {"policy": other, "anchor": variables["params"]}
    # Chosen and rejected answers are beside each other.
    tokens = jnp.stack([kinds.tokens(), kinds.tokens()[::-1]])
    mask = tokens != 0
    dpo = gm.losses.DpoLoss(
        tau=1.0,
        tokens="batch.targets",
        sequence_mask="batch.mask",
        policy_logits="preds.policy.logits",
        anchor_logits="preds.anchor.logits",
    )
    found = []
    for module in (theirs, page.Gemma(ours)):
        policy = gm.nn.AnchoredPolicy(policy=module)
        assert policy.__kontext_keys__()["tokens"] == "batch.tokens"
        made = jax.eval_shape(policy.init, jax.random.key(0), tokens)

        @jax.jit(compiler_options=kinds.QUICK)
        def run(params, policy=policy):
            def loss(params):
                output = policy.apply({"params": params}, tokens)
                return jnp.mean(
                    dpo.get_values(
                        tokens=tokens,
                        sequence_mask=mask,
                        policy_logits=output.policy.logits,
                        anchor_logits=output.anchor.logits,
                    )
                )

            return jax.value_and_grad(loss)(params)

        found.append((shapes(made), run(params)))
    assert found[1][0] == found[0][0]
    (expected, their_grads), (value, grads) = found[0][1], found[1][1]
    assert abs(expected - np.log(2)) > 1e-2
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(their_grads["policy"])) > 1e-2
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["anchor"]))
    assert_close(grads, their_grads, rtol=0, atol=1e-4)


WRAPPERS = {
    "LoRA": lambda model: gm.nn.LoRA(rank=2, model=model),
    "QAT": lambda model: gm.nn.QuantizationAwareWrapper(
        model=model, method=peft.QuantizationMethod.INT4
    ),
    "Int": lambda model: gm.nn.IntWrapper(model=model),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_that_replace_modules_are_refused(models, wrapper):
    _, ours, _ = models
    wrapped = WRAPPERS[wrapper](ours)
    with pytest.raises(Exception, match=r"equigemma\.lora .*equigemma\.quantize"):
        wrapped.init(jax.random.key(0), kinds.tokens())
