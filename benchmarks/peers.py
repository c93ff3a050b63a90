"""Ways to continue a prompt: ours, and those of other libraries, all with the same real weights.

A side is made once in a process of its own, `SIDES[name](ids, new, dtype)`, for one prompt and up
to `new` new tokens; it is a function from a number of tokens to these tokens, greedy, and no token
stops it.
"""

import argparse
import ast
import inspect
import json
import os
import pydoc
import subprocess
import sys
import tempfile
import typing
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path


MODEL = "gemma3-270m"

Side = Callable[[int], list[int]]


def prompt(length: int) -> list[int]:
    """Text that every Python has, and more than enough of it."""
    import equigemma as eg

    _, tokenizer = eg.load(MODEL)
    text = "".join(map(inspect.getsource, (argparse, inspect, typing, pydoc, ast)))
    ids = [2, *tokenizer.encode(text, bos=False)][:length]
    assert len(ids) == length, f"there are only {len(ids)} tokens of text"
    return ids


def ours(ids: list[int], new: int, dtype: str, *, eight_bit: bool = False) -> Side:
    """`sampling.generate`: the whole generation is one program."""
    import jax.numpy as jnp

    import equigemma as eg

    model, _ = eg.load(MODEL, dtype=dtype)
    model = eg.quantize.int8(model) if eight_bit else eg.prepare(model)
    tokens = jnp.asarray(ids)
    room = eg.nn.init_cache(model.config, capacity=len(ids) + new, dtype=model.dtype)
    generate = partial(eg.sampling.generate, model, tokens, cache=room)
    return lambda count: generate(max_new_tokens=count).tokens.tolist()


def transformers(ids: list[int], new: int, dtype: str) -> Side:
    import torch
    from transformers import AutoModelForCausalLM

    import equigemma as eg

    model, tokenizer = eg.load(MODEL, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        eg.save(model, Path(folder) / "model", tokenizer=tokenizer)
        del model
        theirs = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=getattr(torch, dtype)
        ).eval()
    theirs.generation_config.eos_token_id = None
    tokens = torch.tensor([ids])

    def generate(count: int) -> list[int]:
        with torch.inference_mode():
            found = theirs.generate(tokens, max_new_tokens=count, do_sample=False)
        return found[0, len(ids) :].tolist()

    return generate


def gemma(ids: list[int], new: int, dtype: str) -> Side:
    """DeepMind's package with its own sampler."""
    from linen_sampler import sampler

    made, *_ = sampler("theirs", dtype, ids, new)

    def generate(count: int) -> list[int]:
        state = made.sample("", max_new_tokens=count, return_state=True).state
        return state.predicted_tokens[0, :count].tolist()

    return generate


def llama(ids: list[int], new: int, dtype: str) -> Side:
    """llama.cpp, with weights in blocks of eight bits, whatever `dtype` is."""
    import xllamacpp

    import equigemma as eg

    path = Path(tempfile.mkdtemp()) / "model.gguf"
    model, tokenizer = eg.load(MODEL, dtype="float32")
    eg.save(model, path, tokenizer=tokenizer, dtype="q8_0")
    del model
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = len(ids) + new + 8, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.fit_params, params.cache_ram_mib, params.verbosity, params.port = False, 0, 0, 0
    server = xllamacpp.Server(params)
    options = {"temperature": 0, "cache_prompt": False, "return_tokens": True, "ignore_eos": True}

    def generate(count: int) -> list[int]:
        body = json.dumps({"prompt": ids, "n_predict": count, **options}).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/completion", body, kind)
        answer = json.load(urllib.request.urlopen(request))
        assert answer["timings"]["prompt_n"] == len(ids)
        return answer["tokens"]

    return generate


SIDES: dict[str, Callable[[list[int], int, str], Side]] = {
    "ours": ours,
    "ours in 8 bits": partial(ours, eight_bit=True),
    "transformers": transformers,
    "gemma": gemma,
    "llama.cpp in 8 bits": llama,
}
FLOATS = ("ours", "transformers", "gemma")
"""Those that can compute in float32, where all give the same tokens."""


def in_a_process(script: str, arguments: list[str], python: str = sys.executable) -> dict:
    """What a script prints as its last line, in JSON."""
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3"}
    ran = subprocess.run(
        [python, script, *arguments], env=environment, capture_output=True, text=True
    )
    if ran.returncode:
        raise RuntimeError(f"{arguments} failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])
