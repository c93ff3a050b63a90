"""How fast is our model in DeepMind's own sampling loop, against their model on the same weights?

    python benchmarks/linen_sampler.py --gemma-python PATH [--gemma4-python PATH] [--runs 7]
        [--dtype bfloat16] [--prompt 256] [--new 128] [--cache 4096] [--write]

`--gemma-python` names the Python of an environment of `tests/interop/requirements.txt`,
`--gemma4-python` that of one of `tests/interop/requirements-gemma4.txt`. Every run
is a process of its own, theirs and ours by turns, each with a cache for `--cache` tokens, which is
4,096 for the sampler if nobody says otherwise. Decoding is `gm.text.Sampler` with N new tokens
against 1 new token, the faster of two runs each, after compiling; prefill is a compiled `apply` on
the prompt through an empty cache; greedy, no token stops. Before any time is taken, both models
must give the same tokens in float32.
"""

import argparse
import enum
import time
from pathlib import Path
from typing import Any

from files import files_for
from machine import versions_there
from peers import add_gemma
from processes import answer, by_turns, in_a_process
from report import Report, parser_of
from tables import column, ratios, spread, table


MODELS = ("theirs", "ours")
FIGURES = ("decode, ms/token", "prefill, s", "compile, s")


def sampler(
    which: str, files: Path, ids: list[int], new: int, dtype: str, cache: int
) -> tuple[Any, Any, Any]:
    """DeepMind's sampler of a prompt around one of the models, the model, and its parameters."""
    from gemma import gm

    if which == "theirs":
        package = gm.nn
    else:
        from equigemma import linen as package
    model = package.Gemma3_270M(dtype=dtype)
    params = gm.ckpts.load_params(files / f"orbax-{dtype}")

    class Ids:
        """Token ids in place of text, so that both models get the same ones."""

        VERSION = 3
        FORMAT = getattr(gm.text.Gemma3Tokenizer, "FORMAT", None)
        FORBIDDEN_TOKENS = ()

        class special_tokens(enum.IntEnum):
            PAD, EOS, BOS, END_OF_TURN, BEGIN_OF_TOOL_RESPONSE = 0, -1, 2, -2, -3

        def encode(self, text, *, add_bos=False, add_eos=False):
            return ids

        def decode(self, ids):
            return ""

    made = gm.text.Sampler(
        model=model,
        params=params,
        tokenizer=Ids(),
        cache_length=cache,
        max_out_length=new,
        pad_length=len(ids),
    )
    return made, model, params


def measure(
    which: str, files: str, dtype: str, prompt: int, new: int, cache: int
) -> dict[str, Any]:
    """The figures of one process, and the tokens that came out."""
    import jax
    import jax.numpy as jnp

    ids = [2, *(5 + 7919 * i % 200_000 for i in range(prompt - 1))]
    made, model, params = sampler(which, Path(files), ids, new, dtype, cache)

    def sample(count: int) -> tuple[float, Any]:
        started = time.perf_counter()
        output = made.sample("", max_new_tokens=count, return_state=True)
        jax.block_until_ready(output.state.predicted_tokens)
        return time.perf_counter() - started, output.state.predicted_tokens

    first, _ = sample(1)
    short = min(sample(1)[0] for _ in range(2))
    long, tokens = min((sample(new) for _ in range(2)), key=lambda timed: timed[0])

    empty = model.init_cache(
        batch_size=1, dtype=params["final_norm"]["scale"].dtype, cache_length=prompt
    )
    inputs = {
        "tokens": jnp.asarray([ids]),
        "cache": empty,
        "positions": jnp.arange(prompt)[None],
        "attention_mask": jnp.tril(jnp.ones((1, prompt, prompt), bool)),
    }

    @jax.jit
    def whole_prompt(params, inputs):
        return model.apply({"params": params}, **inputs, return_last_only=True).logits

    def prefill() -> float:
        started = time.perf_counter()
        jax.block_until_ready(whole_prompt(params, inputs))
        return time.perf_counter() - started

    prefill()
    return {
        "decode, ms/token": 1e3 * (long - short) / (new - 1),
        "prefill, s": min(prefill() for _ in range(3)),
        "compile, s": first - short,
        "tokens": tokens[0].tolist(),
    }


def main() -> None:
    parser = parser_of(__doc__, runs=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--cache", type=int, default=4096)
    add_gemma(parser)
    parser.add_argument(
        "--gemma4-python",
        metavar="PATH",
        help="the Python of an environment of tests/interop/requirements-gemma4.txt",
    )
    options = parser.parse_args()
    pythons = [each for each in (options.gemma_python, options.gemma4_python) if each]
    if not pythons:
        parser.error("both models run in DeepMind's environment: pass --gemma-python")
    report = Report(options, "equigemma")
    report.say(
        f"Gemma 3 270M, {options.dtype}, `gm.text.Sampler`, prompt of {options.prompt}, "
        f"{options.new} new tokens, a cache for {options.cache:,}; the same tokens in float32.\n"
    )
    with files_for(["gemma"]) as (files, _):
        for python in pythons:
            report.say(f"Both models: {versions_there(python, 'gemma', 'jax')}.\n")
            report.say(compared(files, python, options))


def compared(files: Path, python: str, options: argparse.Namespace) -> str:
    """A table of both models in the environment of one Python."""

    def run(which: str, dtype: str) -> dict[str, Any]:
        sizes = {name: getattr(options, name) for name in ("prompt", "new", "cache")}
        return in_a_process(
            "linen_sampler.py",
            python=python,
            which=which,
            files=str(files),
            dtype=dtype,
            **sizes,
        )

    (exact,) = by_turns(1, MODELS, lambda which: run(which, "float32"))
    if exact["theirs"]["tokens"] != exact["ours"]["tokens"]:
        raise SystemExit(f"The tokens differ in float32: {exact}")
    rounds = by_turns(options.runs, MODELS, lambda which: run(which, options.dtype))
    rows = []
    for figure in FIGURES:
        theirs, ours = (column(rounds, which, figure) for which in MODELS)
        rows.append([figure, *map(spread, (theirs, ours, ratios(theirs, ours)))])
    return table(["", "theirs", "ours", "theirs / ours, in pairs"], rows)


if __name__ == "__main__":
    answer(measure)
    main()
