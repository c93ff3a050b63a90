"""What do weights and caches in few bits cost, and what do they bring?

    python benchmarks/quantization.py [--tokens 4096] [--runs 5] [--write]
        [--forms float32 int8 "int8 groups" "int4 groups" "8-bit cache" bfloat16 ...]

The real Gemma 3 270M, whose published weights are float32 here (unpacked from the file of the
package). For each form: bytes of all weights, tokens per second of a greedy answer, perplexity of a
text beside that of float32, and the largest difference of a logit over its first tokens. Then the
error of each layer, as a share of the size of its weights. The text is the reference of Python that
`help()` shows, from `pydoc_data`, in the alphabetical order of its topics.
"""

import time
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from report import Report, parser_of
from tables import spread, table

import equigemma as eg
from equigemma import quantize
from equigemma._score import scores


LOGITS, NEW = 256, 64


class Form(NamedTuple):
    """What is made of the model, the dtype of activations, and that of keys and values."""

    make: Callable[[Any], Any]
    dtype: Any
    cache: Any = None


_GROUPS = partial(quantize.int8, group_size=32)
FORMS = {
    "float32": Form(eg.prepare, jnp.float32),
    "int8": Form(quantize.int8, jnp.float32),
    "int8 groups": Form(_GROUPS, jnp.float32),
    "int4 groups": Form(quantize.int4, jnp.float32),
    "8-bit cache": Form(eg.prepare, jnp.float32, jnp.int8),
    "bfloat16": Form(eg.prepare, jnp.bfloat16),
    "bfloat16, int8": Form(quantize.int8, jnp.bfloat16),
    "bfloat16, int8 groups": Form(_GROUPS, jnp.bfloat16),
    "bfloat16, int4 groups": Form(quantize.int4, jnp.bfloat16),
    "bfloat16, int8, 8-bit cache": Form(quantize.int8, jnp.bfloat16, jnp.int8),
}


def text_of(tokenizer: Any, tokens: int) -> str:
    """The first topics whose ids are so many."""
    text = ""
    for name in sorted(topics):
        text += topics[name]
        if len(ids := tokenizer.encode(text)) > tokens:
            return tokenizer.decode(np.asarray(ids[1 : tokens + 1]))
    return text


def speed_once(model: Any, cache: Any, ids: jax.Array) -> float:
    """Tokens per second after the first."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        found = eg.sampling.generate(model, ids, max_new_tokens=count, cache_dtype=cache)
        jax.block_until_ready(found.tokens)
        return time.perf_counter() - start

    return (NEW - 1) / (seconds(NEW) - seconds(1))


def speeds(models: dict[str, Any], ids: jax.Array, runs: int) -> dict[str, list[float]]:
    """Of all forms in turn, so that what else the machine does falls on all alike."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(runs + 1):
        for name, model in models.items():
            speed = speed_once(model, FORMS[name].cache, ids)
            if turn:  # the first compiles
                found[name].append(speed)
    return found


def errors_of_layers(plain: Any, forms: dict[str, Any]) -> str:
    rows = []
    found = {name: quantize.quantization_error(plain, model) for name, model in forms.items()}
    layers = [f"layers.{index}." for index in range(len(plain.layers))]
    for place in ("embedding", *layers):
        cells = []
        for errors in found.values():
            here = [100 * error for name, error in errors.items() if name.startswith(place)]
            low, high = min(here), max(here)
            cells.append(f"{low:.2f}" if len(here) == 1 else f"{low:.2f} to {high:.2f}")
        rows.append([place.strip("."), *cells])
    return table(["layer", *forms], rows)


def main() -> None:
    parser = parser_of(__doc__, runs=5)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    options = parser.parse_args()

    report = Report(options, "jax", "equigemma")
    plain, tokenizer = eg.load("gemma3-270m", dtype=jnp.float32)
    text = text_of(tokenizer, options.tokens)
    ids = jnp.asarray(tokenizer.encode(text)[:LOGITS], jnp.int32)

    @partial(jax.jit, static_argnums=1)
    def logits(model: Any, dtype: Any) -> jax.Array:
        cache = eg.init_cache(model.config, capacity=LOGITS, dtype=dtype)
        return model(ids, cache=cache).logits

    exact = np.asarray(logits(eg.prepare(plain), jnp.float32))
    models: dict[str, Any] = {}
    rows: dict[str, list[str]] = {}
    base = 0.0
    for name in options.forms:
        form = FORMS[name]
        cast = jax.tree.map(lambda leaf, dtype=form.dtype: leaf.astype(dtype), plain)
        models[name] = model = form.make(cast)
        del cast
        (scored,) = scores(model, tokenizer, [text], cache_dtype=form.cache)
        base = base or scored.perplexity
        change = 100 * (scored.perplexity / base - 1)
        difference = np.abs(np.asarray(logits(model, form.cache or form.dtype)) - exact)
        megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / 1e6
        rows[name] = [
            f"{megabytes:.0f}",
            f"{scored.perplexity:.4f}",
            f"{change:+.2f} %",
            f"{difference.max():.3f}",
            f"{np.sqrt(np.mean(difference**2)):.4f}",
        ]
        print(f"{name}: {rows[name]}", flush=True)
    timed = speeds(models, ids[:8], options.runs) if options.runs else {name: [] for name in models}
    report.say(
        f"{len(tokenizer.encode(text)) - 1} tokens of text; logits of the first {LOGITS}; "
        f"{NEW} tokens of an answer.\n"
    )
    head = ["form", "MB", "perplexity", f"against {options.forms[0]}", "max Δlogit", "rms Δlogit"]
    speed = {name: spread(found) if found else "-" for name, found in timed.items()}
    lines = [[name, *cells, speed[name]] for name, cells in rows.items()]
    report.say(table([*head, "tokens/s"], lines))
    narrow = {
        name: model
        for name, model in models.items()
        if FORMS[name].dtype == jnp.float32 and FORMS[name].make != eg.prepare
    }
    if narrow:
        report.say("Error of each layer in %, of its matrices the least to the greatest:\n")
        report.say(errors_of_layers(plain, narrow))


if __name__ == "__main__":
    main()
