"""Gemma 1 (arXiv:2403.08295): full attention in every layer, no post-norms, no soft-caps.

The 2B shares one key/value head among its queries, the 7B has one for each. The vocabulary is
that of the published `transformers` checkpoints; DeepMind's own files pad it to 256128 rows.
"""

from typing import Any

from equigemma.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    OwnKVConfig,
    RopeConfig,
)


def _layer(heads: int, kv_heads: int, qkv_axes: Any, hidden: int) -> LayerConfig:
    return LayerConfig(
        attention=AttentionConfig(
            heads=heads,
            head_dim=256,
            kv=OwnKVConfig(heads=kv_heads),
            rope=RopeConfig(),
            query_scale=256**-0.5,
            qkv_axes=qkv_axes,
        ),
        ffw=FeedForwardConfig(hidden_dim=hidden, gate_axes="CDF"),
    )


VARIANTS = {
    "gemma1-2b": ModelConfig(
        vocab=256_000, width=2048, layers=(_layer(8, 1, "NDH,CKDH", 16_384),) * 18
    ),
    "gemma1-7b": ModelConfig(
        vocab=256_000, width=3072, layers=(_layer(16, 16, "CNDH", 24_576),) * 28
    ),
}
