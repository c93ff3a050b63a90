"""DeepMind's trainer, `kauldron`, on their tiny model and ours: losses, evaluators, policies."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import kinds
import numpy as np
import optax
from characters import Characters
from gemma import gm
from kauldron import kd


SENTENCES = [
    {"question": "One and one", "answer": "two"},
    {"question": "Two and two", "answer": "four"},
    {"question": "The river of Paris", "answer": "is the Seine"},
    {"question": "A colour", "answer": "blue"},
]
STEPS = 10


def data(**options):
    """Sentences of ours through their task."""
    task = gm.data.Seq2SeqTask(
        in_prompt="question",
        in_response="answer",
        out_input="tokens",
        out_target="target",
        out_target_mask="mask",
        tokenizer=Characters(),
        **options,
    )
    return kd.data.py.DataSource(
        data_source=SENTENCES,
        shuffle=False,
        num_workers=0,
        batch_size=None if options.get("sampling") else 2,
        num_epochs=None,
        transforms=[task],
    )


def trainer(model, folder, **options):
    loss = kd.losses.SoftmaxCrossEntropyWithIntLabels(
        logits="preds.logits", labels="batch.target", mask="batch.mask"
    )
    defaults = {
        "seed": 42,
        "workdir": folder,
        "train_ds": data(max_length=80, truncate=True),
        "model": model,
        "num_train_steps": STEPS,
        "train_losses": {"loss": loss},
        "optimizer": optax.adam(1e-2),
        "writer": kd.train.metric_writer.NoopWriter(),
    }
    return kd.train.Trainer(**(defaults | options))


# Its name until kauldron 1.3.
InitTransform = getattr(kd.ckpts, "InitTransform", None) or kd.ckpts.AbstractPartialLoader


@dataclasses.dataclass(frozen=True, eq=False)
class Start(InitTransform):
    """Puts given parameters in place of those that a model makes.

    The trainer hashes it, so it is equal to itself only: arrays have no hash.
    """

    params: Any

    def transform(self, state):
        return state.replace(params=self.params)


def test_trains_to_the_same_parameters(tmp_path):
    theirs, ours, variables = kinds.models("gemma3")
    trained = []
    for model in (theirs, ours):
        start = Start(params=variables["params"])
        state, _ = trainer(model, tmp_path, init_transform=start).train()
        trained.append(kinds.flat(state.params))
    before = kinds.flat(variables["params"])
    for name, expected in trained[0].items():
        assert np.abs(expected - before[name]).max() > 1e-3
        # Ten steps of Adam at 1e-2 move parameters by 0.1; sums in another order, by 1e-6.
        np.testing.assert_allclose(trained[1][name], expected, rtol=0, atol=1e-5, err_msg=name)


def test_their_evaluator_samples_the_same_texts(tmp_path, monkeypatch):
    said = []
    sample = gm.text.Sampler.sample

    def noted(self, *args, **options):
        said.append(sample(self, *args, **options))
        return said[-1]

    monkeypatch.setattr(gm.text.Sampler, "sample", noted)
    theirs, ours, variables = kinds.models("gemma3")
    texts = []
    for model in (theirs, ours):
        evaluator = gm.evals.SamplerEvaluator(
            run=kd.evals.EveryNSteps(1),
            max_new_tokens=6,
            cache_length=96,
            pad_length=64,
            num_batches=2,
            ds=data(sampling=True, max_length=None),
        )
        made = trainer(model, tmp_path, evals={"sampling": evaluator})
        state = SimpleNamespace(params=variables["params"])
        made.evals["sampling"].evaluate(state, step=0)
        texts.append(said.copy())
        said.clear()
    assert len(texts[0]) == 2 and texts[0][0] != texts[0][1]
    assert texts[1] == texts[0]


def test_keys_of_kauldron_are_keys():
    _, ours, variables = kinds.models("gemma3")
    key = kd.random.PRNGKey(3)
    made = [
        ours.init(rngs, kinds.tokens()) for rngs in (key, {"params": key}, jax.random.PRNGKey(3))
    ]
    for name, leaf in kinds.flat(made[0]).items():
        for other in made[1:]:
            np.testing.assert_array_equal(kinds.flat(other)[name], leaf)
    output = ours.apply(variables, kinds.tokens(), rngs={"default": key}, is_training_property=True)
    assert output.logits.shape == (2, 11, 131)
