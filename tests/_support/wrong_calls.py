"""Wrong calls around models, and what their errors say: the argument as it was written, and what
to do.

Rows are `name: (call, words of the message)`.
"""

from dataclasses import replace

import equinox as eqx
import formats
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np

import equigemma as eg
from equigemma import interpret, quantize, sampling
from equigemma.chat import Gemma


MODEL, TOKENIZER = formats.model(formats.CONFIGS["gemma3"]), formats.tokenizer()
SEEING = formats.model(formats.SEEING["3 averaged"])
ATTENTION = MODEL.config.layers[0].attention
CONFIG, IDS, KEY = MODEL.config, np.arange(3), jax.random.key(0)
EMBEDDER = jax.tree.map(
    lambda leaf: np.ones(leaf.shape, np.float32),
    eqx.filter_eval_shape(eg.Embedder, CONFIG, (5,), key=KEY),
)


def cache(batch=(), config=CONFIG, **options):
    return eg.init_cache(config, batch, **{"capacity": 8, **options})


def generate(tokens=(1, 2), **options):
    return sampling.generate(MODEL, list(tokens), **{"max_new_tokens": 2, **options})


def within(transformation, function, *arguments):
    return lambda: transformation(function)(*arguments)


def unchecked(call):
    """As users call it: tests check types in all of `nn` and `sampling`, not where `typed` only."""

    def without_checks():
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            return call()
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)

    return without_checks


MODELS = {
    "tokens: none at all": (lambda: MODEL([]), "`tokens` is empty"),
    "tokens: a text": (lambda: MODEL("hello"), "`tokenizer.encode` makes token ids of it"),
    "tokens: None": (lambda: MODEL(None), "`tokens` must be Integer[*B L] or a list; got None"),
    "tokens: floats": (lambda: MODEL(np.zeros(3)), "`tokens` must be Integer[*B L] or a list; got"),
    "tokens: of a dict": (lambda: MODEL({"ids": IDS}), "A call of Transformer: `tokens` must be"),
    "tokens: a single id": (lambda: MODEL(3), "`tokens` must be Integer[*B L] or a list; got 3"),
    "tokens: beyond": (lambda: MODEL([5000]), "`tokens` holds the id 5000, and the vocabulary"),
    "tokens: int8 beyond": (lambda: MODEL(np.int8([-7])), "`tokens` holds the id -7"),
    "tokens: ragged": (lambda: MODEL([[1, 2], [3]]), "`tokens` must have rows of equal length"),
    "mask: too large": (
        lambda: MODEL(IDS, mask=np.ones((5, 3), bool)),
        "`mask` must have the shape (3, 3): a row for each token, and columns, one for each token; "
        "got (5, 3)",
    ),
    "mask: floats": (lambda: MODEL(IDS, mask=np.ones((3, 3))), "`mask` must be Bool"),
    "mask: with a cache": (
        lambda: MODEL(IDS, mask=np.ones((3, 3), bool), cache=cache()),
        "`mask` must have the shape (3, 8)",
    ),
    "positions: too many": (
        lambda: MODEL(IDS, positions=np.arange(4)),
        "`positions` must have one entry for each token, (3,); got (4,)",
    ),
    "positions: floats": (lambda: MODEL(IDS, positions=np.ones(3)), "`positions` must be Integer"),
    "cache: by place": (
        lambda: MODEL(IDS, cache()),
        "by name only: images, positions, mask, cache",
    ),
    "cache: of another model": (
        lambda: MODEL(IDS, cache=cache(config=formats.CONFIGS["gemma2"])),
        "`cache` is of a model with 3 layers, this model has 7. Make it with init_cache",
    ),
    "cache: of more rows": (
        lambda: MODEL(IDS, cache=cache((2,))),
        "`cache` has a batch of shape (2,), `tokens` one of ()",
    ),
    "cache: full": (lambda: MODEL(range(9), cache=cache()), "`cache` has a capacity of 8 tokens"),
    "cache: a tuple": (lambda: MODEL(IDS, cache=(1, 2)), "`cache` must be a Cache or None; got (1"),
    "images: no tower": (
        lambda: MODEL(IDS, images=np.zeros((5, 5, 3), np.uint8)),
        "Images were given, but this model reads text only",
    ),
    "images: floats": (
        lambda: MODEL(IDS, images=np.zeros((5, 5, 3))),
        "`images` must be UInt8[*B I height width 3], UInt8[*B height width 3] or None",
    ),
    "images: of one row for two": (
        lambda: SEEING([[1, 272], [1, 272]], images=np.zeros((1, 5, 5, 3), np.uint8)),
        "`images` must have the batch of `tokens`, (2,), in front: those of each row; got uint8",
    ),
    "trunk: floats": (lambda: MODEL.trunk(np.ones(3)), "Transformer.trunk: `tokens` must be Inte"),
    "soft: another width": (
        lambda: MODEL.trunk([-2, -3, -4, -5], soft_tokens=jnp.ones((1, 4, 5))),
        "`soft_tokens` must have the batch of `tokens`, (), then images, soft tokens and the "
        "model's width, 28; got float32[1,4,5]",
    ),
    "soft: without axes": (
        lambda: MODEL.trunk(IDS, soft_tokens=jnp.ones(3)),
        "`soft_tokens` must be Float[*B I",
    ),
    "unembed: ids": (lambda: MODEL.unembed(IDS), "Transformer.unembed: `x` must be Float[*B D]"),
    "unembed: another width": (
        lambda: MODEL.unembed(jnp.ones((3, 5))),
        "`x` must have vectors of the model's width, 28; got float32[3,5]",
    ),
    "a config by its name": (
        unchecked(lambda: eg.Transformer("gemma3-270m", key=KEY)),
        "`config` must be a ModelConfig, got 'gemma3-270m'. `variants.get` gives one by its name",
    ),
    "a key of a number": (
        unchecked(lambda: eg.Transformer(CONFIG, key=0)),
        "key must be a key such as jax.random.key(0), got 0",
    ),
    "weights of integers": (
        lambda: eg.Transformer(CONFIG, key=KEY, dtype="int32"),
        "`dtype` must be one of bfloat16, float16, float32; got int32",
    ),
    "a variant that is not": (
        lambda: eg.variants.get("gemma9"),
        "There is no model called 'gemma9'",
    ),
    "no variant": (lambda: eg.variants.get(None), "There is no model called None; did you mean"),
    "init_cache: int16": (
        lambda: cache(dtype=jnp.int16),
        "`dtype` must be one of bfloat16, float16, float32, int8; got int16",
    ),
    "init_cache: a model": (
        lambda: cache(config=MODEL),
        "nn.init_cache: `config` must be a ModelConfig; got Transformer(7 layers",
    ),
    "init_cache: no room": (
        lambda: cache(capacity=0),
        "capacity of at least one token, got capacity=0",
    ),
    "init_cache: capacity": (
        lambda: cache(capacity="8"),
        "`capacity` must be a whole number; got '8'",
    ),
    "init_cache: rows": (
        lambda: cache((2.0,)),
        "`batch_shape` must be a whole number or a list; got (2.0",
    ),
    "config: heads of text": (
        lambda: replace(ATTENTION, heads="3"),
        "`AttentionConfig.heads` must be a whole number, got '3'",
    ),
    "config: heads of 3.5": (
        lambda: replace(ATTENTION, heads=3.5),
        "`AttentionConfig.heads` must be a whole number, got 3.5",
    ),
    "config: mask_kind": (
        lambda: replace(ATTENTION, mask_kind="some"),
        "`AttentionConfig.mask_kind` must be 'causal', 'causal_bidirectional_images' or "
        "'bidirectional', got 's",
    ),
    "config: kv": (
        lambda: replace(ATTENTION, kv=1),
        "`AttentionConfig.kv` must be an OwnKVConfig, a KeyIsValueConfig or "
        "a SharedKVConfig, got 1",
    ),
    "config: layers": (
        lambda: replace(CONFIG, layers=26),
        "`ModelConfig.layers` must be a tuple of LayerConfig, got 26",
    ),
    "config: lm_head": (
        lambda: replace(CONFIG, lm_head=True),
        "`ModelConfig.lm_head` must be 'tied' or 'untied', got True",
    ),
    "config: ffw": (
        lambda: replace(CONFIG.layers[0], ffw=17),
        "`LayerConfig.ffw` must be a FeedForwardConfig or a DensePlusMoEConfig, got 17",
    ),
    "describe: a model": (
        lambda: eg.describe(MODEL),
        "describe: `config` must be a ModelConfig; got Transformer(7 layers",
    ),
    "prepare: a config": (
        lambda: eg.prepare(CONFIG),
        "prepare: `model` must be an equinox.Module; got a ModelConfig",
    ),
    "prepare: attention": (
        lambda: eg.prepare(MODEL, attention="flash"),
        "`attention` must be 'xla', 'cudnn', 'tokamax' or None; got 'flash'",
    ),
    "stack: an embedder": (
        lambda: eg.stack(EMBEDDER),
        "stack: `model` must be a Transformer; got an Embedder",
    ),
    "int8: a config": (
        lambda: quantize.int8(CONFIG),
        "quantize.int8: `model` must be an equinox.Module; got a ModelConfig",
    ),
    "int4: a group of text": (
        lambda: quantize.int4(MODEL, group_size="x"),
        "`group_size` must be a whole number; got 'x'",
    ),
    "capture: one path": (
        lambda: interpret.capture(lambda model: model(IDS), MODEL, "layers.0"),
        "`paths` must be a list of str, such as [\"layers.0\"]; got 'layers.0'",
    ),
    "capture: a number": (
        lambda: interpret.capture(lambda model: model(IDS), MODEL, [0]),
        '`paths` must be a list of str, such as ["layers.0"]; got [0]',
    ),
    "capture: no such path": (
        lambda: interpret.capture(lambda model: model(IDS), MODEL, ["layers.99"]),
        "The model has no module at layers.99. A path is written like layers.0.attention",
    ),
    "capture: no function": (
        lambda: interpret.capture(IDS, MODEL, ["layers.0"]),
        "`function` must be a function of a model, such as lambda model: model(tokens); got int",
    ),
    "capture: a config": (
        lambda: interpret.capture(lambda model: model(IDS), CONFIG, ["layers.0"]),
        "`model` must be a Module, got a ModelConfig",
    ),
}

SAMPLING = {
    "keys of other rows": (
        lambda: generate([[1, 2], [3, 4]], key=jax.random.split(KEY, 3)),
        "`key` must be a single key, or one for each row, of shape (2,); got keys of shape (3,)",
    ),
    "a seed as key": (
        lambda: generate(key=0),
        "`key` must be a key such as jax.random.key(0), UInt32[... 2] or None; got 0",
    ),
    "draws without a key": (
        lambda: generate(sampler=sampling.Sample()),
        "pass key=jax.random.key(seed)",
    ),
    "prefill without a cache": (
        unchecked(
            lambda: sampling.prefill(MODEL, IDS, None, sampler=sampling.Greedy(), stop_tokens=IDS)
        ),
        "`cache` must be a Cache, got None. `init_cache` makes one",
    ),
    "a transform that is none": (
        unchecked(lambda: sampling.Greedy("top_k")),
        "A transform must be a function of logits and tokens, as `sampling.top_k(64)` gives one",
    ),
    "sampler: a name": (
        lambda: generate(sampler="greedy"),
        "`sampler` must be an AbstractSampler; got",
    ),
    "top_k: a fraction": (
        unchecked(lambda: sampling.make_sampler(top_k=2.5)),
        "`top_k` must be a whole number, got 2.5",
    ),
    "temperature: a text": (
        unchecked(lambda: sampling.make_sampler(temperature="0.7")),
        "`temperature` must be a number, got '0.7'",
    ),
    "temperature: NaN": (
        lambda: sampling.make_sampler(temperature=float("nan")),
        "A temperature must be above 0, got nan",
    ),
    "top_p: above 1": (
        lambda: sampling.make_sampler(top_p=1.5),
        "top_p must be above 0 and at most 1, got 1.5",
    ),
    "stop: negative": (
        lambda: generate(stop_tokens=[-1]),
        "`stop_tokens` holds the id -1, and the vocabulary ends at 276",
    ),
    "stop: one id": (
        lambda: generate(stop_tokens=5),
        "`stop_tokens` must be a list or Integer[ids]; got 5",
    ),
    "max_new_tokens: none": (
        lambda: generate(max_new_tokens=0),
        "max_new_tokens must be at least 1, got 0",
    ),
    "max_new_tokens: 2.0": (
        lambda: generate(max_new_tokens=2.0),
        "`max_new_tokens` must be a whole number; got 2.0",
    ),
    "samples: none": (lambda: generate(num_samples=0), "samples must be at least 1, got 0"),
    "cache_dtype: int16": (
        lambda: generate(cache_dtype=jnp.int16),
        "`cache_dtype` must be one of bfloat16, float16, float32, int8; got int16",
    ),
    "cache: no room": (
        lambda: generate(max_new_tokens=200, cache=cache()),
        "The cache has a capacity of 8 tokens, but what it holds, the prompt and "
        "max_new_tokens need 2",
    ),
    "a model of a config": (
        lambda: sampling.generate(CONFIG, IDS, max_new_tokens=2),
        "sampling.generate: `model` must be a Transformer; got a ModelConfig",
    ),
    "generate in jit": (
        within(jax.jit, lambda ids: sampling.generate(MODEL, ids, max_new_tokens=2).tokens, IDS),
        "`sampling.generate` cannot be called within jit, vmap or grad: it must know the values of "
        "`tokens`. Call it outside of them. For vmap give it a batch axis; else use",
    ),
    "generate in vmap": (
        within(
            jax.vmap,
            lambda ids: sampling.generate(MODEL, ids, max_new_tokens=2).tokens,
            np.ones((2, 3), np.int32),
        ),
        "`sampling.generate` cannot be called within jit, vmap or grad: it must know the values of",
    ),
    "words in jit": (
        within(eqx.filter_jit, lambda model: eg.generate(model, TOKENIZER, "hello"), MODEL),
        "cannot be called within jit, vmap or grad: it must know the values of `model`",
    ),
    "score in jit": (
        within(eqx.filter_jit, lambda model: eg.score(model, TOKENIZER, "hello"), MODEL),
        "`score` cannot be called within jit, vmap or grad: it must know the values of `model`",
    ),
    "embed in jit": (
        within(eqx.filter_jit, lambda embedder: eg.embed(embedder, TOKENIZER, "h"), EMBEDDER),
        "`embed` cannot be called within jit, vmap or grad: it must know the values of `embedder`",
    ),
    "words: the order": (
        lambda: eg.generate(TOKENIZER, MODEL, "hello"),
        "`model` must be a Transformer, got SentencePieceTokenizer(271 tokens). `eg.load` gives",
    ),
    "words: no tokenizer": (
        lambda: eg.generate(MODEL, None, "hello"),
        "`tokenizer` must be a Tokenizer, got None. `eg.load` gives it beside the model",
    ),
    "words: temperature": (
        unchecked(lambda: eg.generate(MODEL, TOKENIZER, "hello", temperature="0.7")),
        "`temperature` must be a number, got '0.7'",
    ),
    "words: seed": (
        lambda: eg.generate(MODEL, TOKENIZER, "hello", temperature=1.0, seed="x"),
        "`seed` must be a whole number, got 'x'",
    ),
    "stream: no model": (
        lambda: eg.stream(None, TOKENIZER, "hello"),
        "`model` must be a Transformer, got None",
    ),
    "score: an embedder": (
        lambda: eg.score(EMBEDDER, TOKENIZER, "hello"),
        "`model` must be a Transformer, got an Embedder",
    ),
    "score: a number": (
        lambda: eg.score(MODEL, TOKENIZER, 5),
        "`texts` must be a str, token ids or a list of those, got 5",
    ),
    "embed: a model": (
        lambda: eg.embed(MODEL, TOKENIZER, "h"),
        "`embedder` must be an Embedder, got Transformer(7 layers, 42,224 parameters, float32). "
        "`eg.load_embedder` gives one",
    ),
    "embed: a prompt of a number": (
        lambda: eg.embed(EMBEDDER, TOKENIZER, "h", prompt=3),
        "`prompt` must be a str, got 3",
    ),
    "embedder: one size": (
        lambda: eg.Embedder(CONFIG, 5, key=KEY),
        "`dense` must be a list of sizes, got 5",
    ),
    "embed: no batch": (
        lambda: eg.embed(EMBEDDER, TOKENIZER, "h", batch_size=0),
        "batch_size must be at least 1, got 0",
    ),
    "chat: no model": (lambda: eg.Chat(None, TOKENIZER), "`model` must be a Transformer, got None"),
    "chat: a name of a format": (
        lambda: eg.Chat(MODEL, TOKENIZER, format="gemma"),
        "`format` must be a Format such as chat.Gemma(), got 'gemma'",
    ),
    "chat: the class of a format": (
        lambda: eg.Chat(MODEL, None, format=Gemma()),
        "`tokenizer` must be a Tokenizer, got None",
    ),
}
