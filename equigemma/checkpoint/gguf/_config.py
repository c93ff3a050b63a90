"""Architecture metadata of a GGUF file to a `ModelConfig`.

Every value under the architecture's own name is used, or checked against the only one that is
supported, or has no effect on the numbers; any other is refused by name. A value that is left out
is the one that llama.cpp takes then.

**Source:** llama.cpp `src/llama-model.cpp` and `src/models/gemma.cpp`, `gemma2.cpp`, `gemma3.cpp`,
`gemma-embedding.cpp` (`load_arch_hparams`); `docs/gguf.md` of ggml for the names.
"""

import math
from dataclasses import replace

import numpy as np

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.gguf._config_gemma3n import GEMMA3N, read_gemma3n
from equigemma.checkpoint.gguf._config_gemma4 import GEMMA4, read_gemma4
from equigemma.checkpoint.gguf._config_shared import Source
from equigemma.checkpoint.gguf._container import GGUFFile
from equigemma.checkpoint.gguf._options import Limits, Options, read_locals, read_rope_scale
from equigemma.checkpoint.gguf._vocab import token_count
from equigemma.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
    OwnKVConfig,
    RopeConfig,
)


EMBEDDING = "gemma-embedding"
_NEWER = {GEMMA3N: read_gemma3n, GEMMA4: read_gemma4}
ARCHITECTURES = ("gemma", "gemma2", "gemma3", EMBEDDING, *_NEWER)
DENSE = ("dense_2", "dense_3")
"""The linear maps of an embedder, in their order; the tensors have `.weight` behind it."""
HEAD = "output.weight"
"""The output projection; without it the embedding is."""
MEAN = 1
"""Of the ways to make one vector of many."""

# The 27Bs scale queries by width per head. Files do not say so; llama.cpp counts the layers.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def read_config(file: GGUFFile, factors: np.ndarray | None = None) -> ModelConfig:
    """The config that the metadata of a file describe.

    **Arguments:** `factors`: what `read_factors` gives, of which only Gemma 4 has any.

    **Raises:** `CheckpointError` for an unknown architecture, a missing value, an option that is
    not supported, or a model that could never fit the tensors.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"its architecture is {architecture!r}; the known ones are {', '.join(ARCHITECTURES)}."
        )
    options = Options(file.metadata, architecture)
    if architecture == EMBEDDING:
        _expect_embedding(options, file)
    sizes = [math.prod(tensor.shape) for tensor in file.tensors.values()]
    limits = Limits(len(sizes), max(sizes, default=0))
    try:
        vocab = token_count(file.metadata)
        if architecture in _NEWER:
            config = _NEWER[architecture](Source(options, vocab, limits, file.tensors, factors))
        else:
            config = _config(architecture, options, vocab, limits)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"its metadata describe no valid model. {error}") from error
    options.refuse_rest()
    if HEAD in file.tensors and architecture != EMBEDDING:
        config = replace(config, lm_head="untied")
    return config


def _config(architecture: str, options: Options, vocab: int, limits: Limits) -> ModelConfig:
    width = options.size("embedding_length")
    layers = options.size("block_count")
    heads = options.size("attention.head_count")
    kv_heads = options.size("attention.head_count_kv", heads)
    head_dim = options.size("attention.key_length", max(width // heads, 1))
    hidden = options.size("feed_forward_length")
    options.expect("vocab_size", vocab)
    options.expect("attention.value_length", head_dim)
    options.expect("rope.dimension_count", head_dim)
    sizes = (vocab, heads * head_dim, kv_heads * head_dim, hidden)
    limits.check(layers, (size * width for size in sizes))

    norm = NormConfig(epsilon=options.number("attention.layer_norm_rms_epsilon"))
    theta = options.number("rope.freq_base", 10_000.0)
    scale = read_rope_scale(options)
    is_27b = layers == _LAYERS_OF_27B.get(architecture)
    block = LayerConfig(
        attention=AttentionConfig(
            heads=heads,
            head_dim=head_dim,
            kv=OwnKVConfig(heads=kv_heads),
            rope=RopeConfig(theta=theta, scale=scale),
            query_scale=(width // heads if is_27b else head_dim) ** -0.5,
        ),
        ffw=FeedForwardConfig(hidden_dim=hidden),
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
        blocks = _alternate(global_, window, rope, read_locals(options, layers, period=2))
    if architecture in ("gemma3", EMBEDDING):
        final_softcap = options.number("final_logit_softcapping", 0.0) or None
        global_ = replace(block, attention=replace(block.attention, qk_norm=norm), post_norm=norm)
        window = options.size("attention.sliding_window", 0, least=0) or None
        if architecture == EMBEDDING:
            # There a window is that on both sides of a token together.
            window = None if window is None else window // 2 + 1
            global_ = replace(
                global_, attention=replace(global_.attention, mask_kind="bidirectional")
            )
        # The scaling is that of the global layers alone.
        rope = RopeConfig(theta=options.number("rope.freq_base_swa", 10_000.0))
        blocks = _alternate(global_, window, rope, read_locals(options, layers, period=6))
    return ModelConfig(
        vocab=vocab, width=width, layers=blocks, final_norm=norm, final_softcap=final_softcap
    )


def _expect_embedding(options: Options, file: GGUFFile) -> None:
    """Refuses what is around the model and not that of EmbeddingGemma."""
    options.expect("attention.causal", False)
    options.expect("pooling_type", MEAN)
    for name in DENSE:
        tensor = file.tensors.get(f"{name}.weight")
        if tensor is not None and len(tensor.shape) == 2:
            options.expect(f"{name}_feat_out", tensor.shape[0])
            options.expect(f"{name}_feat_in", tensor.shape[1])


def _alternate(
    global_: LayerConfig, window: int | None, rope: RopeConfig, is_local: list[bool]
) -> tuple[LayerConfig, ...]:
    if window is None:
        return (global_,) * len(is_local)
    local = replace(global_, attention=replace(global_.attention, window=window, rope=rope))
    return tuple(local if here else global_ for here in is_local)
