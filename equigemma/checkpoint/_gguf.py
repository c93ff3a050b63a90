"""GGUF files, the format of llama.cpp: what their tensors are called, and how a model is read.

**Source:** llama.cpp `gguf-py/gguf/tensor_mapping.py` for the names; `conversion/gemma.py` for the
scales of norms, which are larger than ours by 1. It leaves the rows of q and k in their order.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from equigemma.checkpoint._gguf_config import read_config
from equigemma.checkpoint._gguf_file import GGUFFile, about
from equigemma.checkpoint._gguf_vocab import read_tokenizer
from equigemma.checkpoint._keymap import Assignment, Rule, fill, leaf_shapes, plan
from equigemma.checkpoint._linen import skeleton
from equigemma.config import ModelConfig
from equigemma.nn import Transformer
from equigemma.tokenizer import SentencePieceTokenizer


RULES = (
    Rule("embedding.weight", "token_embd.weight"),
    Rule("final_norm.scale", "output_norm.weight", offset=1.0),
    Rule("layers.{i}.pre_attention_norm.scale", "blk.{i}.attn_norm.weight", offset=1.0),
    Rule("layers.{i}.post_attention_norm.scale", "blk.{i}.post_attention_norm.weight", offset=1.0),
    Rule("layers.{i}.pre_ffw_norm.scale", "blk.{i}.ffn_norm.weight", offset=1.0),
    Rule("layers.{i}.post_ffw_norm.scale", "blk.{i}.post_ffw_norm.weight", offset=1.0),
    Rule(
        "layers.{i}.attention.projection.q.weight",
        "blk.{i}.attn_q.weight",
        axes="(N H) D -> N D H",
    ),
    Rule(
        "layers.{i}.attention.projection.kv.weight",
        ("blk.{i}.attn_k.weight", "blk.{i}.attn_v.weight"),
        axes="(K H) D -> K D H",
    ),
    Rule("layers.{i}.attention.query_norm.scale", "blk.{i}.attn_q_norm.weight", offset=1.0),
    Rule("layers.{i}.attention.key_norm.scale", "blk.{i}.attn_k_norm.weight", offset=1.0),
    Rule(
        "layers.{i}.attention.output.weight", "blk.{i}.attn_output.weight", axes="D (N H) -> N H D"
    ),
    Rule("layers.{i}.ffw.gate.weight", ("blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight")),
    Rule("layers.{i}.ffw.down.weight", "blk.{i}.ffn_down.weight", axes="D F -> F D"),
)


def load_gguf(
    path: Path, *, dtype: np.dtype, progress: Callable[[int, int, str], None] | None
) -> tuple[Transformer, SentencePieceTokenizer]:
    """Model and tokenizer of a GGUF file; the arguments are those of `equigemma.load`."""
    file = GGUFFile.open(path)
    with about(path):
        model = skeleton(read_config(file))
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        assignments = plan(leaf_shapes(model), RULES, shapes)
        tokenizer = read_tokenizer(file.metadata)
        total = sum(math.prod(entry.shape) for entry in assignments) * dtype.itemsize
        done = 0
        leaves: dict[str, jax.Array] = {}
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for entry in assignments:
                leaf = leaves[entry.path] = _read_leaf(file, entry, dtype, pool)
                done += leaf.nbytes
                if progress is not None:
                    progress(done, total, entry.path)
    return fill(model, leaves), tokenizer


def load_gguf_config(path: Path) -> ModelConfig:
    """The config of a GGUF file, from its header alone."""
    file = GGUFFile.open(path)
    with about(path):
        return read_config(file)


def _read_leaf(
    file: GGUFFile, entry: Assignment, dtype: np.dtype, pool: ThreadPoolExecutor
) -> jax.Array:
    # An offset is taken off before rounding: a norm close to its offset keeps all its digits.
    wide = np.dtype(np.float32) if entry.rule.offset else dtype
    parts = [file.read(file.tensors[key], wide, pool) for key in entry.keys]
    leaf = np.ascontiguousarray(entry.to_ours(*parts), dtype)
    # Waiting here keeps one leaf at a time on its way to the device.
    return jax.block_until_ready(jax.device_put(leaf))
