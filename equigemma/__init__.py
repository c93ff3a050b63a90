"""The Gemma family of language models as plain Equinox pytrees.

A process that is forked after JAX has computed anything hangs in its first computation: start
others before, or by `multiprocessing.get_context("spawn")`.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from equigemma import config as config
from equigemma import nn as nn
from equigemma import sampling as sampling
from equigemma import variants as variants
from equigemma._describe import cache_bytes as cache_bytes
from equigemma._describe import describe as describe
from equigemma._describe import parameter_counts as parameter_counts
from equigemma._prepare import prepare as prepare
from equigemma._score import Score as Score
from equigemma._score import score as score
from equigemma._stack import stack as stack
from equigemma._stack import unstack as unstack
from equigemma.config import ModelConfig as ModelConfig
from equigemma.nn import Cache as Cache
from equigemma.nn import Output as Output
from equigemma.nn import Transformer as Transformer
from equigemma.nn import init_cache as init_cache
from equigemma.text import generate as generate
from equigemma.text import stream as stream


if _TYPE_CHECKING:
    from equigemma import chat as chat
    from equigemma import checkpoint as checkpoint
    from equigemma import data as data
    from equigemma import interpret as interpret
    from equigemma import linen as linen
    from equigemma import lora as lora
    from equigemma import peft as peft
    from equigemma import quantize as quantize
    from equigemma import sharding as sharding
    from equigemma import tokenizers as tokenizers
    from equigemma import train as train
    from equigemma.chat import Chat as Chat
    from equigemma.checkpoint import load as load
    from equigemma.checkpoint import load_embedder as load_embedder
    from equigemma.checkpoint import save as save
    from equigemma.embedding import Embedder as Embedder
    from equigemma.embedding import embed as embed

# Imported when they are first used, so that a program waits only for what it needs.
_PARTS = (
    "chat",
    "checkpoint",
    "data",
    "interpret",
    "linen",
    "lora",
    "peft",
    "quantize",
    "sharding",
    "tokenizers",
    "train",
)
_NAMES = {
    "Chat": "chat",
    "Embedder": "embedding",
    "embed": "embedding",
    "load": "checkpoint",
    "load_embedder": "checkpoint",
    "save": "checkpoint",
}

__all__ = [
    "Cache",
    "Chat",
    "Embedder",
    "ModelConfig",
    "Output",
    "Score",
    "Transformer",
    "cache_bytes",
    "chat",
    "checkpoint",
    "config",
    "data",
    "describe",
    "embed",
    "generate",
    "init_cache",
    "interpret",
    "linen",
    "load",
    "load_embedder",
    "lora",
    "nn",
    "parameter_counts",
    "peft",
    "prepare",
    "quantize",
    "sampling",
    "save",
    "score",
    "sharding",
    "stack",
    "stream",
    "tokenizers",
    "train",
    "unstack",
    "variants",
]


def __getattr__(name: str):
    if name in _PARTS:
        return _import_module(f"equigemma.{name}")
    if name in _NAMES:
        value = getattr(_import_module(f"equigemma.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    if name == "__version__":
        from importlib.metadata import version

        return version("equigemma")
    raise AttributeError(f"module 'equigemma' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS, *_NAMES, "__version__"})
