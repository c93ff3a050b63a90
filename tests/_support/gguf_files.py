"""Small GGUF files, written by the `gguf` library itself."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np


LETTERS = "▁ehlot"
PIECES = ["▁h", "el", "lo", "<table>", "<end_of_turn>"]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
TOKENS += [*LETTERS, *PIECES]
TYPES = [3, 3, 3, 2, *[6] * 256, *[1] * len(LETTERS), 1, 1, 1, 4, 3]
SCORES = [-float(index) for index in range(len(TOKENS))]
assert len(TOKENS) == len(TYPES) == 271

VOCABULARY = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": SCORES,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.add_space_prefix": False,
}

WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, WINDOW = 7, 17, 6, 3, 10, 3, 5
OPTIONS = {
    "gemma3.context_length": 8192,
    "gemma3.embedding_length": WIDTH,
    "gemma3.block_count": LAYERS,
    "gemma3.feed_forward_length": HIDDEN,
    "gemma3.attention.head_count": HEADS,
    "gemma3.attention.head_count_kv": KV_HEADS,
    "gemma3.attention.key_length": HEAD_DIM,
    "gemma3.attention.value_length": HEAD_DIM,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": WINDOW,
    "gemma3.rope.freq_base": 1_000_000.0,
}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a Gemma 3 of these sizes, float32."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
    for index in range(LAYERS):
        layer = {
            "attn_norm": (WIDTH,),
            "attn_q": (HEADS * HEAD_DIM, WIDTH),
            "attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
            "attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
            "attn_q_norm": (HEAD_DIM,),
            "attn_k_norm": (HEAD_DIM,),
            "attn_output": (WIDTH, HEADS * HEAD_DIM),
            "post_attention_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (HIDDEN, WIDTH),
            "ffn_up": (HIDDEN, WIDTH),
            "ffn_down": (WIDTH, HIDDEN),
            "post_ffw_norm": (WIDTH,),
        }
        shapes |= {f"blk.{index}.{name}.weight": shape for name, shape in layer.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    options: dict[str, Any] = OPTIONS,
    arrays: dict[str, np.ndarray] | None = None,
    *,
    architecture: str = "gemma3",
    vocabulary: dict[str, Any] = VOCABULARY,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Writes a file. Values of None are left out; `kinds`: what packed bytes are."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (options | vocabulary).items():
        match value:
            case None:
                continue
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, array in (tensors() if arrays is None else arrays).items():
        writer.add_tensor(name, array, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
