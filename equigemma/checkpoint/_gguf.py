"""GGUF files, the format of llama.cpp: what their tensors are called, and how a model is read.

**Source:** llama.cpp `gguf-py/gguf/tensor_mapping.py` for the names; `conversion/gemma.py` for the
scales of norms, which are larger than ours by 1. It leaves the rows of q and k in their order.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from equigemma.checkpoint._errors import about
from equigemma.checkpoint._gguf_config import DENSE, read_config
from equigemma.checkpoint._gguf_file import GGUFFile
from equigemma.checkpoint._gguf_vocab import read_tokenizer
from equigemma.checkpoint._keymap import Ignore, Rule, fill, leaf_shapes, plan
from equigemma.checkpoint._layout import gate_axes
from equigemma.checkpoint._linen import skeleton
from equigemma.checkpoint._stored import Opened, stored
from equigemma.config import ModelConfig
from equigemma.tokenizer import Tokenizer


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Names for the leaves of a model with this config."""
    norms = {
        "pre_attention_norm": "attn_norm",
        "post_attention_norm": "post_attention_norm",
        "pre_ffw_norm": "ffn_norm",
        "post_ffw_norm": "post_ffw_norm",
        "attention.query_norm": "attn_q_norm",
        "attention.key_norm": "attn_k_norm",
    }
    q, k, v = (f"blk.{{i}}.attn_{name}.weight" for name in "qkv")
    projection = "layers.{i}.attention.projection."
    gates = [
        Rule(
            f"layers.{i}.ffw.gate.weight",
            (f"blk.{i}.ffn_gate.weight", f"blk.{i}.ffn_up.weight"),
            axes=f"F D -> {gate_axes(config, i)}",
        )
        for i in range(len(config.layers))
    ]
    return (
        Rule("embedding.weight", "token_embd.weight"),
        Rule("final_norm.scale", "output_norm.weight", offset=1.0),
        *(
            Rule(f"layers.{{i}}.{ours}.scale", f"blk.{{i}}.{theirs}.weight", offset=1.0)
            for ours, theirs in norms.items()
        ),
        Rule(f"{projection}q.weight", q, axes="(N H) D -> N D H"),
        Rule(f"{projection}kv.weight", (k, v), axes="(K H) D -> K D H"),
        Rule(f"{projection}qkv.weight", (q, k, v), axes="(N H) D -> N D H"),
        Rule(
            "layers.{i}.attention.output.weight",
            "blk.{i}.attn_output.weight",
            axes="D (N H) -> N H D",
        ),
        *gates,
        Rule("layers.{i}.ffw.down.weight", "blk.{i}.ffn_down.weight", axes="D F -> F D"),
    )


_AROUND = tuple(Ignore(f"{name}.weight", "it comes after the model") for name in DENSE)


def open_gguf(path: Path) -> Opened:
    """Model and tokenizer of a GGUF file, of which only the header is read.

    **Raises:** `CheckpointError` if something is missing, damaged, or not supported.
    """
    file = GGUFFile.open(path)
    with about(path):
        config = read_config(file)
        model = skeleton(config)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        assignments = plan(leaf_shapes(model), rules(config), shapes, _AROUND)

    def read_key(key: str, dtype: np.dtype) -> np.ndarray:
        with about(path), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return file.read(file.tensors[key], dtype, pool)

    def tokenizer() -> Tokenizer:
        with about(path):
            return read_tokenizer(file.metadata, origin=path)

    weights = {
        entry.path: stored(entry, (file.tensors[key].dtype for key in entry.keys), read_key)
        for entry in assignments
    }
    return Opened(fill(model, weights), tokenizer)


def open_gguf_config(path: Path) -> ModelConfig:
    """The config of a GGUF file, from its header alone."""
    file = GGUFFile.open(path)
    with about(path):
        return read_config(file)
