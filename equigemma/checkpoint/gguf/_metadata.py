"""A config and a vocabulary to the metadata of a GGUF file, from which llama.cpp builds the model.

**Source:** ggml `docs/gguf.md` for the names; llama.cpp `conversion/gemma.py` for which are needed,
`src/models/gemma.cpp`, `gemma2.cpp`, `gemma3.cpp` for what is made of them.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._extras import Extras
from equigemma.checkpoint.core._layout import Uniform, check_described, is_newer, uniform
from equigemma.checkpoint.gguf._config import EMBEDDING, MEAN, read_config
from equigemma.checkpoint.gguf._config_gemma3n import describe_gemma3n
from equigemma.checkpoint.gguf._config_gemma4 import describe_gemma4, turning
from equigemma.checkpoint.gguf._container import GGUFFile, Tensor
from equigemma.config import AltUpConfig, LayerConfig, ModelConfig
from equigemma.tokenizers import SpecialTokens
from equigemma.tokenizers import _sentencepiece_model as spm


_CONTEXTS = {"gemma3": 32_768, EMBEDDING: 2048}
_PERIODS = {"gemma2": 2, "gemma3": 6}


def describe_config(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    context_length: int | None,
    factors: np.ndarray | None = None,
) -> dict[str, Any]:
    """The metadata about the architecture, whose name is that in front of every key.

    **Arguments:** `shapes`: those of the file's tensors. `factors`: its factors of angles.

    **Raises:** `CheckpointError` if llama.cpp has no architecture that is this model.
    """
    if is_newer(config):
        return _describe_newer(config, shapes, context_length, factors)
    parts = uniform(config)
    attention = parts.attention
    name = "gemma"
    if parts.first.post_norm is not None:
        name = "gemma2" if attention.qk_norm is None else "gemma3"
    if attention.mask_kind == "bidirectional":
        name = EMBEDDING
    if config.lm_head == "untied" and name != "gemma3":
        raise CheckpointError(
            f"llama.cpp gives models of the architecture {name} the embedding for their head, and "
            "this one has a head of its own; a folder can hold it."
        )
    rope = (parts.global_ or attention).rope
    data: dict[str, Any] = {
        "context_length": context_length or _CONTEXTS.get(name, 8192),
        "embedding_length": config.width,
        "block_count": len(config.layers),
        "feed_forward_length": parts.hidden,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": parts.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": config.final_norm.epsilon,
        "rope.freq_base": rope.theta,
    }
    if rope.scale != 1.0:
        data |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.scale}
    if name == "gemma2":
        data["attn_logit_softcapping"] = attention.softcap
        data["final_logit_softcapping"] = config.final_softcap
    if name == EMBEDDING:
        data |= _of_embedding(parts, period=_period(config))
    elif name != "gemma" and parts.local is not None:
        data["attention.sliding_window"] = parts.local.window
        period = _period(config)
        if period != _PERIODS[name]:
            data["attention.sliding_window_pattern"] = period
        if parts.local.rope.theta != (10_000.0 if name == "gemma3" else rope.theta):
            data["rope.freq_base_swa"] = parts.local.rope.theta
    metadata = _named(name, data)
    # Whether the description says it all is not argued but tried.
    check_described(config, _read_back(name, metadata, config, shapes, None), name)
    return metadata


def _describe_newer(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    context_length: int | None,
    factors: np.ndarray | None,
) -> dict[str, Any]:
    stream = config.stream
    has_streams = isinstance(stream, AltUpConfig)
    name, told, noted = describe_gemma3n(config, stream) if has_streams else describe_gemma4(config)
    metadata = _named(name, {"context_length": context_length or 32_768} | told)
    # Read back without what llama.cpp does not read: it would compute this model too.
    described = _read_back(name, metadata, config, shapes, factors)
    check_described(_as_text(config), _as_text(described), name)
    return metadata | _named(name, noted)


def _as_text(config: ModelConfig) -> ModelConfig:
    """The same model of text, with its shares of heads that turn written as whole pairs.

    What its images see is not described.
    """

    def as_text(layer: LayerConfig) -> LayerConfig:
        attention = layer.attention
        if attention.mask_kind == "causal_bidirectional_images":
            attention = replace(attention, mask_kind="causal")
        if pairs := turning(attention):
            rope = replace(attention.rope, proportion=2 * pairs / attention.head_dim)
            attention = replace(attention, rope=rope)
        return replace(layer, attention=attention)

    return replace(config, layers=tuple(map(as_text, config.layers)))


def _named(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": _as_stored(value) for key, value in data.items() if value is not None}


def _of_embedding(parts: Uniform, *, period: int) -> dict[str, Any]:
    """What is said of EmbeddingGemma only; the rest llama.cpp does not read but knows."""
    local = parts.local
    if local is None or local.window is None or period != 6 or local.rope.theta != 10_000.0:
        raise CheckpointError(
            "llama.cpp has every sixth layer of such a model see all, and a rotary base of 10,000 "
            "in the others; this one is different."
        )
    return {"attention.sliding_window": 2 * (local.window - 1), "pooling_type": MEAN}


def describe_vocabulary(
    vocabulary: spm.Vocabulary, special: SpecialTokens, rows: int
) -> dict[str, Any]:
    """The metadata about the tokenizer, with a token for each row of the embedding."""
    extra = rows - len(vocabulary.tokens)
    # Pieces that are matched as they stand are stored with spaces, all others with their sign.
    tokens = [
        token.replace("▁", " ") if kind == spm.USER_DEFINED else token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    prefix = "tokenizer.ggml."
    # Two keys besides that of `eos`; llama.cpp knows Gemma's own end of a turn by its spelling.
    stop = [i for i in special.stop if i not in (special.eos, special.end_of_turn)]
    stop += [] if special.end_of_turn in (None, special.eos) else [special.end_of_turn]
    ends = dict(zip((f"{prefix}eot_token_id", f"{prefix}eom_token_id"), stop, strict=False))
    return ends | {
        f"{prefix}model": "llama",
        f"{prefix}pre": "default",
        f"{prefix}tokens": tokens + [f"[PAD{len(tokens) + index}]" for index in range(extra)],
        f"{prefix}scores": [float(score) for score in vocabulary.scores] + [-1000.0] * extra,
        f"{prefix}token_type": [int(kind) for kind in vocabulary.types] + [spm.UNUSED] * extra,
        f"{prefix}bos_token_id": special.bos,
        f"{prefix}eos_token_id": special.eos,
        f"{prefix}padding_token_id": special.pad,
        f"{prefix}unknown_token_id": special.unknown,
        f"{prefix}add_bos_token": True,
        f"{prefix}add_eos_token": False,
        f"{prefix}add_space_prefix": False,
    }


def describe_origin(extras: Extras, name: str) -> dict[str, Any]:
    """The metadata that a user reads, and the chat template."""
    data = dict(extras.notes) | {"general.type": "model", "general.name": extras.name or name}
    if extras.chat_template is not None:
        data["tokenizer.chat_template"] = extras.chat_template
    return data


def _period(config: ModelConfig) -> int:
    """Every how many layers one is global; if they follow no period, reading it back will show."""
    first = next(
        (index for index, layer in enumerate(config.layers) if layer.attention.window is None),
        len(config.layers),
    )
    return first + 1


def _as_stored(value: Any) -> Any:
    """A number as it will be read: the file keeps 32 bits."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_back(
    name: str,
    metadata: Mapping[str, Any],
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    factors: np.ndarray | None,
) -> ModelConfig:
    """The config that a reader of the file would see."""
    around = {"general.architecture": name, "tokenizer.ggml.tokens": [""] * config.vocab}
    tensors = {key: Tensor(key, 0, shape, 0, 1, 4) for key, shape in shapes.items()}
    return read_config(GGUFFile(Path(), dict(metadata) | around, tensors), factors)
