"""Ways to continue a prompt: ours, and those of other libraries, all with the same real weights.

A side is made in a process of its own, `SIDES[name](files, ids, new, dtype, capacity)`, for one
prompt and up to `new` new tokens, greedy; no token stops it. Where a cache has a size it has room
for `capacity` tokens, or for those if they are more.
"""

import argparse
import copy
import json
import os
import sys
import urllib.request
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from files import EIGHT_BITS, Q8_0
from machine import versions_there
from report import Report


class Side(NamedTuple):
    generate: Callable[[int], list[int]]
    """So many new tokens, from the beginning of the prompt."""
    weights: int
    """Bytes of all of them, which a step reads once."""
    resume: Callable[[int], list[int]] | None = None
    """The same, the prompt being in a cache but for its last token, so that this takes less time.

    None: there is no such way, or none that is the same.
    """


def ours(
    files: Path, ids: list[int], new: int, dtype: str, capacity: int = 0, *, eight_bit: bool = False
) -> Side:
    """The bare loop, `sampling.generate` on ids: the whole generation is one program."""
    import jax.numpy as jnp

    import equigemma as eg

    model, _ = _load(files, dtype, eight_bit)
    tokens = jnp.asarray(ids)
    empty = eg.init_cache(model.config, capacity=max(capacity, len(ids) + new), dtype=model.dtype)
    continued = partial(eg.sampling.generate, model)
    said = []

    def generate(count: int) -> list[int]:
        return continued(tokens, cache=empty, max_new_tokens=count).tokens.tolist()

    def resume(count: int) -> list[int]:
        if not said:
            said.append(continued(tokens[:-1], cache=empty, max_new_tokens=1).cache)
        return continued(tokens[-1:], cache=said[0], max_new_tokens=count).tokens.tolist()

    return Side(generate, _bytes(model), resume)


def text(
    files: Path, ids: list[int], new: int, dtype: str, capacity: int = 0, *, piecewise: bool = False
) -> Side:
    """`eg.generate` or `eg.stream`: from a text to a text, in one program or token by token."""
    import equigemma as eg

    model, tokenizer = _load(files, dtype)
    found: list[int] = []

    class Same:
        """The tokenizer, but for the ids of the prompt; it notes what it is asked to spell."""

        special, vocab_size = tokenizer.special, tokenizer.vocab_size

        def encode(self, text, *, bos=True, special=False):
            return ids

        def decode(self, ids):
            found.extend(map(int, ids))
            return tokenizer.decode(ids)

        def token_bytes(self, index):
            found.append(int(index))
            return tokenizer.token_bytes(index)

    def generate(count: int) -> list[int]:
        found.clear()
        options = {"max_new_tokens": count, "stop_tokens": ()}
        if piecewise:
            "".join(eg.stream(model, Same(), "the prompt", **options))
        else:
            eg.generate(model, Same(), "the prompt", **options)
        return list(found)

    return Side(generate, _bytes(model))


def transformers(files: Path, ids: list[int], new: int, dtype: str, capacity: int = 0) -> Side:
    """Its cache grows with the text."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(files / dtype, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    tokens = torch.tensor([ids])
    said = []

    def generate(count: int, **options) -> list[int]:
        with torch.inference_mode():
            found = model.generate(tokens, max_new_tokens=count, do_sample=False, **options)
        return found[0, len(ids) :].tolist()

    def resume(count: int) -> list[int]:
        if not said:
            with torch.inference_mode():
                said.append(model(tokens[:, :-1], logits_to_keep=1).past_key_values)
        return generate(count, past_key_values=copy.deepcopy(said[0]))

    return Side(generate, sum(each.nbytes for each in model.parameters()), resume)


def gemma(files: Path, ids: list[int], new: int, dtype: str, capacity: int = 0) -> Side:
    """DeepMind's package with its own sampler."""
    import jax
    from gemma.gm.text import _sampler
    from linen_sampler import sampler

    cache = max(capacity, len(ids) + new + 8)
    made, _, params = sampler("theirs", files, ids, new, dtype, cache)

    def generate(count: int) -> list[int]:
        state = made.sample("", max_new_tokens=count, return_state=True).state
        return state.predicted_tokens[0, :count].tolist()

    read, said = _sampler._prefill.prefill, []

    def read_once(**inputs):
        if not said:
            said.append(read(**inputs))
        return said[0]

    def resume(count: int) -> list[int]:
        # Its sampler reads the prompt at every call; its loop changes nothing of what that gave.
        with patch.object(_sampler._prefill, "prefill", read_once):
            return generate(count)

    return Side(generate, sum(leaf.nbytes for leaf in jax.tree.leaves(params)), resume)


def llama(files: Path, ids: list[int], new: int, dtype: str, capacity: int = 0) -> Side:
    """llama.cpp, with weights in blocks of eight bits, whatever `dtype` is."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(files / Q8_0)
    params.n_ctx = max(capacity, len(ids) + new + 8)
    params.n_parallel, params.n_gpu_layers = 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.fit_params, params.cache_ram_mib, params.verbosity, params.port = False, 0, 0, 0
    server = xllamacpp.Server(params)
    options = {"temperature": 0, "return_tokens": True, "ignore_eos": True}

    def generate(count: int, *, resume: bool = False) -> list[int]:
        asked = {"prompt": ids, "n_predict": count, "cache_prompt": resume, **options}
        kind = {"Content-Type": "application/json"}
        address = f"{server.listening_address}/completion"
        request = urllib.request.Request(address, json.dumps(asked).encode(), kind)
        answer = json.load(urllib.request.urlopen(request))
        assert resume or answer["timings"]["prompt_n"] == len(ids), "it had read a part before"
        return answer["tokens"]

    # What it read last is in its cache; the first call that resumes may read the prompt once more.
    return Side(generate, (files / Q8_0).stat().st_size, partial(generate, resume=True))


def _load(files: Path, dtype: str, eight_bit: bool = False):
    import equigemma as eg

    if eight_bit:
        return eg.load(files / EIGHT_BITS)
    return eg.load(files / dtype, dtype=dtype, transform=eg.prepare)


def _bytes(model) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


SIDES: dict[str, Callable[..., Side]] = {
    "ours": ours,
    "ours in 8 bits": partial(ours, eight_bit=True),
    "eg.generate": text,
    "eg.stream": partial(text, piecewise=True),
    "transformers": transformers,
    "gemma": gemma,
    "llama.cpp in 8 bits": llama,
}
OTHER = ", other jax"
"""Behind the name of a side of ours that runs in the environment of `--other-python`."""
TWICE = ("ours", "ours in 8 bits", "ours in 4 bits", "bf16", "f32")
"""Those that do."""
FLOATS = ("ours", f"ours{OTHER}", "eg.generate", "eg.stream", "transformers", "gemma")
"""Those that can compute in float32, where all give the same tokens."""
TEXT = ("eg.generate", "eg.stream")
"""Those from text to text, which read the prompt in every run."""
_NEEDS = {"transformers": ("torch", "transformers"), "llama.cpp in 8 bits": ("xllamacpp",)}
PACKAGES = ("jax", "equigemma", "torch", "transformers", "xllamacpp")


def add_sides(parser: argparse.ArgumentParser, sides: Iterable[str]) -> None:
    """The options that `installed` and `python_of` read."""
    sides = list(sides)
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides)
    add_other(parser)
    add_gemma(parser)


def add_other(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--other-python",
        metavar="PATH",
        help="the Python of an environment with another version of JAX, where ours run too",
    )


def add_gemma(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gemma-python",
        metavar="PATH",
        help="the Python of an environment of tests/interop/requirements.txt",
    )


def installed(options: argparse.Namespace, *packages: str) -> tuple[list[str], Report]:
    """The sides that can run here, and a report that says which cannot."""
    absent = {
        side: f"there is no {package}"
        for side in options.sides
        for package in _NEEDS.get(side, ())
        if find_spec(package) is None
    }
    if "gemma" in options.sides and not options.gemma_python:
        absent["gemma"] = "no --gemma-python was given"
    there = [side for side in options.sides if side not in absent]
    versions = []
    if options.other_python:
        there += [side + OTHER for side in there if side in TWICE]
        versions.append(f"other: {versions_there(options.other_python, 'jax', 'jaxlib')}")
    if "gemma" in there:
        versions.append(f"for gemma {versions_there(options.gemma_python, 'gemma', 'jax')}")
    report = Report(options, *packages, versions="; ".join(versions))
    if absent:
        reasons = "; ".join(f"{side}, as {reason}" for side, reason in absent.items())
        report.say(f"Not measured: {reasons}.\n")
    return there, report


def python_of(side: str, options: argparse.Namespace) -> str:
    if side.endswith(OTHER):
        return options.other_python
    return options.gemma_python if side == "gemma" else sys.executable
