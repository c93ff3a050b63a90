"""The same real weights, Gemma 3 270M, in the files that each library likes to read.

Made once for a script, so that a process holds nothing but what its own side needs. Also the ids of
the prompts, a text that every Python has: the source of some of its modules.
"""

import argparse
import ast
import inspect
import json
import pydoc
import tempfile
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from processes import answer, in_a_process


MODEL = "gemma3-270m"
EIGHT_BITS, Q8_0, TEXT = "8-bit", "q8_0.gguf", "text.json"
DTYPES = ("float32", "bfloat16")
_FILES = {
    "ours in 8 bits": (EIGHT_BITS,),
    "llama.cpp in 8 bits": (Q8_0,),
    "gemma": tuple(f"orbax-{dtype}" for dtype in DTYPES),
}


class Parameters(NamedTuple):
    """How many there are in the products of a token."""

    layers: int
    unembedding: int


@contextmanager
def files_for(sides: Iterable[str]) -> Iterator[tuple[Path, Parameters]]:
    """A folder with what these sides need, and the number of parameters."""
    names = {name for side in sides for name in _FILES.get(side, DTYPES)}
    with tempfile.TemporaryDirectory() as folder:
        made = in_a_process("files.py", folder=folder, names=sorted(names))
        yield Path(folder), Parameters(*made["parameters"])


def prompt(files: Path, length: int) -> list[int]:
    ids = json.loads((files / TEXT).read_text())[:length]
    if len(ids) < length:
        raise ValueError(f"The text for the prompts has {len(ids)} tokens, not {length}.")
    return ids


def measure(folder: str, names: list[str]) -> dict:
    """Writes the files."""
    import jax

    import equigemma as eg

    files = Path(folder)
    for dtype in DTYPES:
        model, tokenizer = eg.load(MODEL, dtype=dtype)
        if dtype in names:
            eg.save(model, files / dtype, tokenizer=tokenizer)
        if (name := f"orbax-{dtype}") in names:
            eg.save(model, files / name, format="orbax")
        if dtype == "float32" and Q8_0 in names:
            eg.save(model, files / Q8_0, tokenizer=tokenizer, dtype="q8_0")
        if dtype == "bfloat16" and EIGHT_BITS in names:
            eg.save(eg.quantize.int8(model), files / EIGHT_BITS, tokenizer=tokenizer)
    text = "".join(map(inspect.getsource, (argparse, inspect, typing, pydoc, ast)))
    (files / TEXT).write_text(json.dumps([2, *tokenizer.encode(text, bos=False)]))
    parts = model.layers, model.output_embedding
    return {"parameters": [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in parts]}


if __name__ == "__main__":
    answer(measure)
