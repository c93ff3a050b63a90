"""Wrong calls of training, adapters and data, as rows of the table in `test_errors`."""

import equinox as eqx
import formats
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from equigemma import data, lora, train
from equigemma.chat import Assistant, User


TOKENIZER = formats.tokenizer()
KEY = jax.random.key(0)
EXAMPLES = [train.Example([2, 3, 4, 5, 6], [1] * 5) for _ in range(6)]
OPTIMIZER = optax.sgd(0.01)


MODEL = tiny.model(tiny.GEMMA3)
ADAPTED = lora.add(MODEL, rank=2, key=KEY)
BATCH = next(train.pack(EXAMPLES, length=8, rows=3))


def batches_of(examples=None, *, length=8, rows=2, **options):
    return train.batches(
        EXAMPLES if examples is None else examples, length=length, rows=rows, **options
    )


def batch(**changed):
    names = ("tokens", "targets", "weights", "positions", "segments")
    return train.Batch(**{name: getattr(BATCH, name) for name in names} | changed)


def state(optimizer=OPTIMIZER):
    return train.init(MODEL, optimizer)


def step(loss=train.next_token_loss, given=None, of=None, optimizer=OPTIMIZER, **options):
    """One step, which must not come so far as to be compiled."""
    run = train.make_step(loss, optimizer, **options)
    return run(state() if of is None else of, BATCH if given is None else given)


def fit(batches=None, *, start=None, run=None, steps=1, **options):
    run = train.make_step(train.next_token_loss, OPTIMIZER) if run is None else run
    return train.fit(
        run, state() if start is None else start, batches_of() if batches is None else batches,
        steps=steps, **options,
    )  # fmt: skip


def loss(model=None, given=None, **options):
    model, given = (MODEL if model is None else model), (BATCH if given is None else given)
    return train.next_token_loss(model, given, **options)


def reused():
    once = state()
    once.step.delete()
    return step(of=once)


def checkpoints(folder="unused", **options):
    return train.Checkpoints(folder, **options)


def labelled():
    tree = jax.tree.map(lambda _: "a", eqx.filter(MODEL, eqx.is_inexact_array))
    return state(optax.multi_transform({"a": OPTIMIZER}, tree))


def add(model=None, *, rank=2, key=KEY, **options):
    return lora.add(MODEL if model is None else model, rank=rank, key=key, **options)


def stacked():
    return lora.stack([lora.split(ADAPTED)[0]])


TRAINING = {
    "a loss that returns a scalar": (
        lambda: step(lambda *given: train.next_token_loss(*given)[0]),
        "got float32[]. Where it returns a mean, return (m",
    ),
    "a loss that returns text": (lambda: step(lambda *_: ("a", 1.0)), "got (str, floa"),
    "no loss": (lambda: step(None), "`loss` must be a function of a model and a batch"),
    "loss and optimizer swapped": (
        lambda: train.make_step(OPTIMIZER, train.next_token_loss),
        "`loss` must be a function of a model and a batch",
    ),
    "no loss to evaluate": (lambda: train.make_evaluate(3), "`loss` must be a function"),
    "one batch to evaluate": (
        lambda: train.make_evaluate(train.next_token_loss)(MODEL, BATCH),
        "`batches` must give batches, as from train.pack; got a Batch",
    ),
    "batches with states to evaluate": (
        lambda: train.make_evaluate(train.next_token_loss)(MODEL, batches_of(epochs=1)),
        "train.batches gives a batch and its DataState: take the first",
    ),
    "no loss of rows": (lambda: train.per_example_gradients(None), "`loss` must be a function"),
    "a reused state": (reused, "A step has taken over the arrays of this state. Go on with the st"),
    "uneven micro-batches": (
        lambda: step(micro_batches=2),
        "micro_batches=2 must divide the first axis",
    ),
    "half a micro-batch": (
        lambda: step(micro_batches=1.5),
        "`micro_batches` must be a whole number, got 1.5",
    ),
    "a norm as text": (lambda: step(max_grad_norm="1"), "`max_grad_norm` must be a number, got"),
    "a model as the state": (
        lambda: step(of=MODEL),
        "`state` must be a train.State, as from train.init(model, optimizer); got Transformer(",
    ),
    "ids as the batch": (
        lambda: step(given=BATCH.tokens),
        "`batch` must be a train.Batch or train.ImageBatch, got int32[3,8]",
    ),
    "a batch with its state as the batch": (
        lambda: step(given=next(batches_of())),
        "`batch` must be a train.Batch",
    ),
    "an optimizer that is not made": (
        lambda: state(optax.adam),
        "`optimizer` must be a transformation of optax, such as optax.adamw(1e-4); got the func",
    ),
    "a rate as the optimizer": (lambda: state(0.1), "`optimizer` must be a transf"),
    "a name as the optimizer": (lambda: step(optimizer="adam"), "`optimizer` must be a transforma"),
    "the state of another optimizer": (
        lambda: step(of=state(optax.adam(0.1))),
        "it has ScaleByAdamState, and should have nothing",
    ),
    "a tree of labels": (labelled, "optax has called a tree of labels"),
    "labels by a name": (
        lambda: train.param_labels("embedding"),
        "`label` must be a function of a path and an array, got 'embedding'",
    ),
    "trainable by a name": (
        lambda: train.init(MODEL, OPTIMIZER, trainable="lora"),
        "`trainable` must be a function of an array, or a tree",
    ),
    "trainable of another model": (
        lambda: train.init(MODEL, OPTIMIZER, trainable=lora.trainable(ADAPTED)),
        "`trainable` must be a function of an array, or a tree of True and False of the model's",
    ),
    "trainable integers": (
        lambda: train.init({"a": jnp.arange(3)}, OPTIMIZER, trainable=eqx.is_array),
        "`trainable` selects int32[3], which has no gradient: choose floats",
    ),
    "merge of a model": (lambda: train.merge(MODEL), "`state` must be a train.State"),
    "fewer than no steps": (lambda: fit(steps=-1), "steps must be at least 0, got -1"),
    "batches without states": (
        lambda: fit(train.pack(EXAMPLES, length=8, rows=3)),
        "`batches` must give pairs of a batch and its train.DataState",
    ),
    "one batch to fit": (lambda: fit(BATCH), "`batches` must give pairs of a batch and its train"),
    "a model to fit": (lambda: fit(start=MODEL), "`state` must be a train.State"),
    "a loss as the step": (
        lambda: fit(run=train.next_token_loss),
        "`model` must be a Transformer, got a State. That of a state is train.merge(state)",
    ),
    "a folder as the checkpoints": (
        lambda: fit(checkpoints="folder"),
        "`checkpoints` must be train.Checkpoints(folder), got 'folder'",
    ),
    "a number as the data state": (
        lambda: fit(data_state=3),
        "`data_state` must be a train.DataState, got 3",
    ),
    "no report": (lambda: fit(report=None), "`report` must be a function of a Report, got None"),
    "no checkpoints kept": (lambda: checkpoints(keep=0), "keep must be at least 1, got 0"),
    "checkpoints nowhere": (lambda: checkpoints(None), "`folder` must be a path, got None"),
}

BATCHES = {
    "weights of another shape": (
        lambda: loss(given=batch(weights=BATCH.weights[:, 1:])),
        "arrays of a batch are rows of one shape; got tokens [3, 8]",
    ),
    "positions of another shape": (
        lambda: loss(given=batch(positions=BATCH.positions[:1])),
        "rows of one shape;",
    ),
    "weights that are NaN": (
        lambda: loss(given=batch(weights=BATCH.weights * jnp.nan)),
        "`weights` of a batch must be finite",
    ),
    "ids below 0": (
        lambda: loss(given=batch(tokens=BATCH.tokens - 9)),
        "Tokens and targets are ids from 0 to",
    ),
    "ids that are floats": (
        lambda: loss(given=batch(tokens=BATCH.tokens.astype("float32"))),
        "`tokens` of a batch must be an array of integers, got float32[3,8]",
    ),
    "model and batch swapped": (
        lambda: loss(BATCH, MODEL),
        "`model` must be a Transformer, got a Batch",
    ),
    "chunks of half a token": (lambda: loss(chunk=1.5), "`chunk` must be a whole number, got 1.5"),
    "chunks of nothing": (lambda: loss(chunk=0), "chunk must be at least 1, got 0"),
    "too much smoothing": (
        lambda: loss(label_smoothing=2.0),
        "`label_smoothing` must be a finite number, from 0 to 1; got 2.0",
    ),
    "z-loss as text": (lambda: loss(z_loss="0.1"), "`z_loss` must be a number, got '0.1'"),
    "an unknown policy": (
        lambda: loss(remat=True),
        "`remat` must be one of nothing, dots_no_batch, dots; got True",
    ),
    "computing in integers": (
        lambda: loss(compute_dtype="int8"),
        "`compute_dtype` must be one of bfloat16, float16, float32; got int8",
    ),
    "a batch for preferences": (
        lambda: train.dpo_loss(MODEL, BATCH),
        "`pairs` must be a train.PreferenceBatch, as from train.collate_pairs, got a Batch",
    ),
    "examples for pairs": (
        lambda: next(train.collate_pairs(EXAMPLES, length=8, rows=2)),
        "`pairs` must be pairs of train.Example, the better answer first; number 0 is an Example",
    ),
    "no rows of pairs": (
        lambda: train.collate_pairs([], length=8, rows=0),
        "A batch needs at least 1 row, got rows=0",
    ),
    "no rows": (lambda: batches_of(rows=0), "A batch needs at least 1 row, got rows=0"),
    "no rows to pack": (
        lambda: train.pack(EXAMPLES, length=8, rows=0),
        "A batch needs at least 1 row",
    ),
    "rows of a float": (lambda: batches_of(rows=2.5), "`rows` must be a whole number, got 2.5"),
    "a length of nothing": (
        lambda: batches_of(length=0),
        "rows of at least 2 tokens, got length=0",
    ),
    "a length of text": (
        lambda: batches_of(length="8"),
        "`length` must be a whole number, got '8'",
    ),
    "a text as the examples": (
        lambda: batches_of("hello"),
        "`examples` must be a list of train.Example",
    ),
    "ids as the examples": (
        lambda: batches_of([[2, 3]]),
        "`examples` must be train.Example, number 0 is [2, 3]; data.read, data.from_text",
    ),
    "a key as the seed": (
        lambda: batches_of(seed=KEY),
        "`seed` must be a whole number, got key<fry>[",
    ),
    "epochs below 0": (lambda: batches_of(epochs=-1), "epochs must be at least 0, got -1"),
    "a start that is a number": (
        lambda: batches_of(start=3),
        "`start` must be a train.DataState, as it came",
    ),
    "a start of other examples": (
        lambda: batches_of(start=train.DataState(0, 100)),
        "`start` is after 100 chunks of an epoch, and these examples have 6",
    ),
    "a config as the tower": (
        lambda: batches_of(vision=MODEL.config),
        "`vision` must be the config of a vision tower, model.config.vision, or None; got a Model",
    ),
    "a fraction of text": (
        lambda: train.split(EXAMPLES, "0.1", length=8),
        "`fraction` must be a number, got '0.1'",
    ),
    "ids of 40 bits": (lambda: train.Example([2**40], [1]), "Token ids have 32 bits; an example h"),
    "an id below 0": (lambda: train.Example([2, -2], [1, 1]), "token 1 of an example is -2"),
    "a weight that is NaN": (
        lambda: train.Example([2, 3], [1, np.nan]),
        "Weights are finite; that of token 1 is nan",
    ),
    "too few weights": (lambda: train.Example([2, 3], [1]), "got 2 tokens and 1 weights"),
    "text as ids": (
        lambda: train.Example("hello", [1] * 5),
        "`tokens` of an example must be a row",
    ),
    "a path as the images": (
        lambda: train.Example([2], [1], images="cat.png"),
        "`images` of an example must be a list",
    ),
}

ADAPTERS = {
    "rank 0": (lambda: add(rank=0), "needs a rank of at least 1, a whole number; got 0"),
    "a key of floats": (
        lambda: add(key=jnp.zeros(2)),
        "key must be a key such as jax.random.key(0), got float32[2]",
    ),
    "several keys": (lambda: add(key=jax.random.split(KEY, 3)), "key must be a key"),
    "alpha as text": (lambda: add(alpha="16"), "`alpha` must be a number, got '16'"),
    "places by name": (
        lambda: add(where=["q_proj"]),
        "`where` must be a function of a path and",
    ),
    "no dtype": (lambda: add(dtype=None), "`dtype` must be one of"),
    "a config to adapt": (lambda: add(MODEL.config), "`model` has nothing that could have an adap"),
    "no list to stack": (lambda: lora.stack(ADAPTED), "`adapters` must be a list of what lora.spl"),
    "half an adapter": (
        lambda: lora.take(stacked(), 0.5),
        "`which` must be numbers of adapters, got 0.5",
    ),
    "an adapter beyond": (
        lambda: lora.take(stacked(), [0, 1]),
        "`which` must be from 0 to 0, got [0, 1]",
    ),
    "the last adapter as -1": (
        lambda: lora.take(stacked(), -1),
        "`which` must be from 0 to 0, got",
    ),
    "take of a model": (lambda: lora.take(MODEL, 0), "`stacked` must be what lora.stack gives"),
    "transfer swapped": (
        lambda: lora.transfer(MODEL, ADAPTED),
        "`adapted` has no adapters, got Transformer(",
    ),
    "transfer to another width": (
        lambda: lora.transfer(ADAPTED, tiny.model(formats.CONFIGS["gemma3"])),
        "layers.0.attention.projection.q: the adapter is of a weight of shape [",
    ),
    "a name as the format": (
        lambda: data.from_messages([User("h"), Assistant("x")], TOKENIZER, format="gemma"),
        "`format` must be a chat format, such as chat.Gemma() or",
    ),
    "text and tokenizer swapped": (
        lambda: data.from_text(TOKENIZER, "x"),
        "`tokenizer` must be one of equigemma.tokenizers, as from equigemma.load; got 'x'",
    ),
}
