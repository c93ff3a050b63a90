"""Wrong calls of what changes a model or keeps it, and what their errors say. See `wrong_calls`."""

import equinox as eqx
import jax.numpy as jnp
import optax
from wrong_calls import CONFIG, KEY, MODEL

import equigemma as eg
from equigemma import lora, nn, peft, train


OUT = "never-written"


def adapted():
    return lora.add(MODEL, rank=1, key=KEY, where=lambda path, _: path == "layers.0.ffw.down")


class Own(nn.AbstractEinsum):
    eqn: str = eqx.field(static=True, default="...F,FD->...D")

    def __call__(self, x):
        return x


def own():
    return eqx.tree_at(lambda m: m.layers[0].ffw.down, MODEL, Own())


def step(loss=lambda model, batch: (jnp.sum(model * batch), 1.0), *, times=1, rows=2, **options):
    """Steps of training, all from the first state."""
    optimizer = optax.sgd(0.1)
    state = train.init(jnp.ones(()), optimizer)
    run = train.make_step(loss, optimizer, **options)
    for _ in range(times):
        run(state, jnp.ones(rows))


CHANGES = {
    "lora: rank 100,000": (
        lambda: lora.add(MODEL, rank=100_000, key=KEY),
        "rank=100000 is more than any weight chosen has, which is 28",
    ),
    "lora: twice": (
        lambda: lora.add(adapted(), rank=1, key=KEY),
        "layers.0.ffw.down has an adapter already: fold it in with lora.merge, drop it with",
    ),
    "lora: a rank of 2.5": (lambda: lora.add(MODEL, rank=2.5, key=KEY), "a whole number; got 2.5"),
    "lora: key": (
        lambda: lora.add(MODEL, rank=1, key=0),
        "key must be a key such as jax.random.key(0), got 0",
    ),
    "lora: where": (
        lambda: lora.add(MODEL, rank=1, key=KEY, where=["q_proj"]),
        "`where` must be a function of a path and what is there, such as `lambda path, part: ",
    ),
    "lora: alpha": (
        lambda: lora.add(MODEL, rank=1, key=KEY, alpha="x"),
        "`alpha` must be a number, got 'x'",
    ),
    "lora: dtype": (
        lambda: lora.add(MODEL, rank=1, key=KEY, dtype="int8"),
        "`dtype` must be one of bfloat16, float16, float32; got int8",
    ),
    "lora: a config": (
        lambda: lora.add(CONFIG, rank=1, key=KEY),
        "`model` has nothing that could have an adapter, got a ModelConfig",
    ),
    "unmerge: nothing": (
        lambda: lora.unmerge(MODEL),
        "keeps no adapters to unmerge; merge it with",
    ),
    "a loss of a scalar": (
        lambda: step(lambda model, batch: jnp.sum(model * batch)),
        "A loss must return two scalars, the sum over the targets and the sum of their weights; "
        "got float32[]. Where it returns a mean, return (mean, 1.0)",
    ),
    "a state that is gone": (
        lambda: step(times=2),
        "A step has taken over the arrays of this state. Go on with the state it returned",
    ),
    "micro_batches: uneven": (
        lambda: step(rows=3, micro_batches=2),
        "micro_batches=2 must divide the first axis of every array of a batch, its rows; got an "
        "array of shape [3]",
    ),
    "save: a module of one's own": (
        lambda: eg.save(own(), OUT),
        "cannot be saved: it has an Own at layers.0.ffw.down, which no file format has a name for",
    ),
    "save: adapters": (
        lambda: eg.save(adapted(), OUT),
        "it has a LoRAEinsum at layers.0.ffw.down, which no file format has a name for: fold",
    ),
    "save: a config": (
        lambda: eg.save(CONFIG, OUT),
        "checkpoint.save: `model` must be a Transformer or an Embedder; got a ModelConfig",
    ),
    "save: no path": (lambda: eg.save(MODEL, None), "`path` must be a str or a path; got None"),
    "save: format": (
        lambda: eg.save(MODEL, OUT, format="onnx"),
        "`format` must be 'huggingface', 'gguf', 'orbax', 'orbax-flat', 'equigemma' or None; got",
    ),
    "save: dtype": (
        lambda: eg.save(MODEL, OUT, dtype="int3"),
        "Weights are saved as float32, bfloat16 or float16, got dtype=int3",
    ),
    "save: tokenizer": (
        lambda: eg.save(MODEL, OUT, tokenizer="x"),
        "`tokenizer` must be a Tokenizer or None; got 'x'",
    ),
    "save: a .gguf without words": (
        lambda: eg.save(MODEL, OUT + ".gguf"),
        "A .gguf holds its tokenizer, and there is none: pass what load gave",
    ),
    "load: nothing there": (
        lambda: eg.load("nowhere/at/all"),
        "There is nothing to load at 'nowhere",
    ),
    "load: None": (lambda: eg.load(None), "`source` must be a str or a path; got None"),
    "load: dtype": (
        lambda: eg.load("nowhere", dtype="int3"),
        "bfloat16 or float16, got dtype=int3",
    ),
    "peft: the order": (
        lambda: peft.load(OUT, MODEL),
        "peft.load: `model` must be a Transformer; got 'never-written'.",
    ),
    "peft: no adapters": (
        lambda: peft.save(MODEL, OUT),
        "the model has no adapters; `lora.add` ma",
    ),
}
