"""DeepMind's configs and golden files as ours."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import equigemma as eg
from equigemma.checkpoint._linen import from_params
from equigemma.config import (
    AttentionConfig,
    Dense,
    LayerConfig,
    ModelConfig,
    NormConfig,
    OwnKV,
    RopeConfig,
)


GOLDEN = Path(__file__).parent / "golden"


def config_of(fields: Mapping[str, Any]) -> ModelConfig:
    """Our description of the model that upstream's `TransformerConfig` fields describe."""
    per_head = fields["embed_dim"] // fields["num_heads"]
    query_scale = {
        "BY_ONE_OVER_SQRT_HEAD_DIM": fields["head_dim"] ** -0.5,
        "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS": per_head**-0.5,
    }[fields["query_pre_attn_norm"]]

    def layer(kind: str) -> LayerConfig:
        local = kind == "LOCAL_SLIDING"
        reach = "local" if local else "global"
        return LayerConfig(
            attention=AttentionConfig(
                heads=fields["num_heads"],
                head_dim=fields["head_dim"],
                kv=OwnKV(heads=fields["num_kv_heads"]),
                rope=RopeConfig(
                    theta=float(fields[f"{reach}_base_frequency"]),
                    scale=fields[f"{reach}_scale_factor"],
                ),
                query_scale=query_scale,
                window=fields["sliding_window_size"] if local else None,
                softcap=fields["attn_logits_soft_cap"],
                qk_norm=NormConfig() if fields["use_qk_norm"] else None,
                qkv_axes=("CNDH" if fields["num_heads"] == fields["num_kv_heads"] else "NDH,CKDH"),
            ),
            ffw=Dense(
                hidden=fields["hidden_dim"],
                gate_axes="CFD" if fields["transpose_gating_einsum"] else "CDF",
            ),
            post_norm=NormConfig() if fields["use_post_attn_norm"] else None,
        )

    return ModelConfig(
        vocab=fields["num_embed"],
        width=fields["embed_dim"],
        layers=tuple(layer(kind) for kind in fields["attention_types"]),
        final_softcap=fields["final_logit_softcap"],
    )


@dataclass(frozen=True)
class Golden:
    """A tiny model of upstream's, as ours, and what upstream computed with it."""

    model: eg.Transformer
    arrays: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]


def golden(name: str) -> Golden:
    """The golden file `name`."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    config = config_of(json.loads(str(arrays.pop("config"))))
    tree: dict[str, Any] = {}
    for key in [key for key in arrays if key.startswith("params/")]:
        *parents, leaf = key.removeprefix("params/").split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(arrays.pop(key))
    return Golden(from_params(config, tree), arrays)
