"""What the metadata of a GGUF file say about the architecture, as a `ModelConfig`.

Every value under the architecture's own name is used, or checked against the only one that is
supported, or has no effect on the numbers; any other is refused by name. A value that is left out
is the one that llama.cpp takes then.

**Source:** llama.cpp `src/llama-model.cpp` and `src/models/gemma.cpp`, `gemma2.cpp`, `gemma3.cpp`,
`gemma-embedding.cpp` (`load_arch_hparams`); `docs/gguf.md` of ggml for the names.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from equigemma.checkpoint._errors import CheckpointError
from equigemma.checkpoint._gguf_file import GGUFFile
from equigemma.checkpoint._gguf_vocab import token_count
from equigemma.config import (
    AttentionConfig,
    Dense,
    LayerConfig,
    ModelConfig,
    NormConfig,
    OwnKV,
    RopeConfig,
)


EMBEDDING = "gemma-embedding"
ARCHITECTURES = ("gemma", "gemma2", "gemma3", EMBEDDING)
DENSE = ("dense_2", "dense_3")
"""The linear maps of an embedder, in their order; the tensors have `.weight` behind it."""
MEAN = 1
"""Of the ways to make one vector of many."""

# Limits that a model was trained for, and notes on how it was made: nothing to compute with.
_WITHOUT_EFFECT = (
    "context_length",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)
# Options of which one value is supported.
_FIXED = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}
# The 27Bs scale queries by width per head. Files do not say so; llama.cpp counts the layers.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def read_config(file: GGUFFile) -> ModelConfig:
    """The config that the metadata of a file describe.

    **Raises:** `CheckpointError` for an unknown architecture, a missing value, an option that is
    not supported, or a model that could never fit the tensors.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"its architecture is {architecture!r}; the known ones are {', '.join(ARCHITECTURES)}."
        )
    if file.metadata.get("split.count", 1) != 1:
        raise CheckpointError(
            "it is one part of several; join them with llama-gguf-split --merge and load that."
        )
    options = _Options(file.metadata, architecture)
    if architecture == EMBEDDING:
        _expect_embedding(options, file)
    sizes = [math.prod(tensor.shape) for tensor in file.tensors.values()]
    limits = _Limits(len(sizes), max(sizes, default=0))
    try:
        config = _config(architecture, options, token_count(file.metadata), limits)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"its metadata describe no valid model. {error}") from error
    options.refuse_rest()
    return config


class _Limits(NamedTuple):
    """What a file holds, so that a made-up size is refused before anything is built from it."""

    tensors: int
    largest: int

    def check(self, layers: int, sizes: tuple[int, ...], width: int) -> None:
        if layers > self.tensors:
            raise CheckpointError(
                f"its metadata claim {layers} layers, and it has {self.tensors} tensors."
            )
        if max(sizes) * width > self.largest:
            raise CheckpointError(
                f"its metadata describe a weight of {max(sizes) * width} numbers, and its largest "
                f"tensor has {self.largest}."
            )


class _Options:
    """The values under one architecture's name, and which of them nobody has asked for yet."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        prefix = f"{architecture}."
        self._architecture = architecture
        self._rest = {
            key.removeprefix(prefix): value
            for key, value in metadata.items()
            if key.startswith(prefix)
        }

    def number(self, key: str, default: float | None = None) -> float:
        value = self._take(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise CheckpointError(f"{self._architecture}.{key} must be a number, got {value!r}.")
        return value

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.number(key, default)
        if value != int(value) or value < least:
            raise CheckpointError(
                f"{self._architecture}.{key} must be a whole number from {least} up, got {value!r}."
            )
        return int(value)

    def _take(self, key: str, default: Any) -> Any:
        value = self._rest.pop(key, default)
        if value is None:
            raise CheckpointError(f"its metadata lack {self._architecture}.{key}.")
        return value

    def optional(self, key: str, default: Any) -> Any:
        return self._rest.pop(key, default)

    def expect(self, key: str, only: Any) -> None:
        """Refuses any value but one."""
        value = self._rest.pop(key, only)
        if value != only:
            raise CheckpointError(
                f"{self._architecture}.{key} is {value!r}; only {only!r} is supported here."
            )

    def refuse_rest(self) -> None:
        for key, only in _FIXED.items():
            self.expect(key, only)
        unknown = sorted(set(self._rest) - set(_WITHOUT_EFFECT))
        if unknown:
            raise CheckpointError(
                "it has options that are not supported: "
                + ", ".join(f"{self._architecture}.{key}" for key in unknown)
                + "."
            )


def _config(architecture: str, options: _Options, vocab: int, limits: _Limits) -> ModelConfig:
    width = options.size("embedding_length")
    layers = options.size("block_count")
    heads = options.size("attention.head_count")
    kv_heads = options.size("attention.head_count_kv", heads)
    head_dim = options.size("attention.key_length", max(width // heads, 1))
    hidden = options.size("feed_forward_length")
    options.expect("vocab_size", vocab)
    options.expect("attention.value_length", head_dim)
    options.expect("rope.dimension_count", head_dim)
    limits.check(layers, (vocab, heads * head_dim, kv_heads * head_dim, hidden), width)

    norm = NormConfig(epsilon=options.number("attention.layer_norm_rms_epsilon"))
    theta = options.number("rope.freq_base", 10_000.0)
    scale = _rope_scale(options)
    is_27b = layers == _LAYERS_OF_27B.get(architecture)
    block = LayerConfig(
        attention=AttentionConfig(
            heads=heads,
            head_dim=head_dim,
            kv=OwnKV(heads=kv_heads),
            rope=RopeConfig(theta=theta, scale=scale),
            query_scale=(width // heads if is_27b else head_dim) ** -0.5,
        ),
        ffw=Dense(hidden=hidden),
        pre_norm=norm,
    )
    final_softcap = None
    blocks = (block,) * layers
    if architecture == "gemma2":
        final_softcap = options.number("final_logit_softcapping", 30.0)
        softcap = options.number("attn_logit_softcapping", 50.0)
        global_ = replace(
            block, attention=replace(block.attention, softcap=softcap), post_norm=norm
        )
        window = options.size("attention.sliding_window", 4096)
        rope = RopeConfig(theta=options.number("rope.freq_base_swa", theta), scale=scale)
        blocks = _alternate(global_, window, rope, _locals(options, layers, period=2))
    if architecture in ("gemma3", EMBEDDING):
        final_softcap = options.number("final_logit_softcapping", 0.0) or None
        global_ = replace(block, attention=replace(block.attention, qk_norm=norm), post_norm=norm)
        window = options.size("attention.sliding_window", 0, least=0) or None
        if architecture == EMBEDDING:
            # There a window is that on both sides of a token together.
            window = None if window is None else window // 2 + 1
            global_ = replace(global_, attention=replace(global_.attention, visibility="all"))
        # The scaling is that of the global layers alone.
        rope = RopeConfig(theta=options.number("rope.freq_base_swa", 10_000.0))
        blocks = _alternate(global_, window, rope, _locals(options, layers, period=6))
    return ModelConfig(
        vocab=vocab, width=width, layers=blocks, final_norm=norm, final_softcap=final_softcap
    )


def _expect_embedding(options: _Options, file: GGUFFile) -> None:
    """Refuses what is around the model and not that of EmbeddingGemma."""
    options.expect("attention.causal", False)
    options.expect("pooling_type", MEAN)
    for name in DENSE:
        tensor = file.tensors.get(f"{name}.weight")
        if tensor is not None and len(tensor.shape) == 2:
            options.expect(f"{name}_feat_out", tensor.shape[0])
            options.expect(f"{name}_feat_in", tensor.shape[1])


def _rope_scale(options: _Options) -> float:
    kind = options.optional("rope.scaling.type", "linear")
    old_name = options.number("rope.scale_linear", 0.0)
    factor = options.number("rope.scaling.factor", old_name) or 1.0
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"its rope.scaling.type is {kind!r}; only 'none' and 'linear' are supported."
        )
    return factor if kind == "linear" else 1.0


def _locals(options: _Options, layers: int, *, period: int) -> list[bool]:
    """Which layers have a window: all but the last of every `period`, or those the file lists."""
    listed = options.optional("attention.sliding_window_pattern", period)
    if isinstance(listed, int):
        return [not listed or index % listed < listed - 1 for index in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers:
        raise CheckpointError(
            "its attention.sliding_window_pattern must be a number, or a list with an entry for "
            f"each of {layers} layers; got {listed!r}."
        )
    return [bool(here) for here in listed]


def _alternate(
    global_: LayerConfig, window: int | None, rope: RopeConfig, is_local: list[bool]
) -> tuple[LayerConfig, ...]:
    if window is None:
        return (global_,) * len(is_local)
    local = replace(global_, attention=replace(global_.attention, window=window, rope=rope))
    return tuple(local if here else global_ for here in is_local)
