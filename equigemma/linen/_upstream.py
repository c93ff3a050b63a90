"""DeepMind's `TransformerConfig` as ours: a table of generations, each with the fields it knows.

Configs come as objects of any version of their package or as mappings of their fields; enumerations
count by name. A field that we do not know is refused, because it may change what is computed.
"""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from equigemma.config import (
    AttentionConfig,
    Dense,
    LayerConfig,
    ModelConfig,
    NormConfig,
    OwnKV,
    RopeConfig,
)


@dataclass(frozen=True)
class _Generation:
    """`required` fields have no default there, `optional` ones have the default given here."""

    name: str
    required: frozenset[str]
    optional: Mapping[str, Any]
    build: Callable[[Mapping[str, Any]], ModelConfig]

    @property
    def known(self) -> frozenset[str]:
        return self.required | frozenset(self.optional)


def config_from_upstream(config: Any) -> ModelConfig:
    """The text model that `config` describes.

    **Raises:** `ValueError` that names every field which is unknown or missing, or the value that
    is not supported; `TypeError` if `config` is neither a mapping nor a dataclass.
    """
    given = _fields(config)
    for generation in _GENERATIONS:
        if set(given) <= generation.known:
            missing = sorted(generation.required - set(given))
            if missing:
                raise ValueError(f"A config of {generation.name} needs also {', '.join(missing)}.")
            return generation.build({**generation.optional, **given})
    nearest = min(_GENERATIONS, key=lambda generation: len(set(given) - generation.known))
    unknown = sorted(set(given) - nearest.known)
    raise ValueError(
        f"This config is not of a generation that can be converted "
        f"({', '.join(generation.name for generation in _GENERATIONS)}): it has also "
        f"{', '.join(unknown)}."
    )


def _fields(config: Any) -> dict[str, Any]:
    if is_dataclass(config) and not isinstance(config, type):
        config = {field.name: getattr(config, field.name) for field in fields(config)}
    if not isinstance(config, Mapping):
        raise TypeError(
            "from_upstream needs a TransformerConfig of DeepMind's package or a mapping of its "
            f"fields, got a {type(config).__name__}."
        )
    return {name: _by_name(value) for name, value in config.items()}


def _by_name(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return tuple(_by_name(entry) for entry in value)
    return value


def _choose(fields: Mapping[str, Any], name: str, choices: Mapping[str, Any]) -> Any:
    """The choice that the field `name` makes."""
    if fields[name] not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {fields[name]!r}.")
    return choices[fields[name]]


def _gemma2_or_3(fields: Mapping[str, Any]) -> ModelConfig:
    if fields["use_post_attn_norm"] != fields["use_post_ffw_norm"]:
        raise ValueError(
            "`use_post_attn_norm` and `use_post_ffw_norm` must be equal, as in every published "
            f"model; got {fields['use_post_attn_norm']} and {fields['use_post_ffw_norm']}."
        )
    per_head = fields["embed_dim"] // fields["num_heads"]
    query_scale = _choose(
        fields,
        "query_pre_attn_norm",
        {
            "BY_ONE_OVER_SQRT_HEAD_DIM": fields["head_dim"] ** -0.5,
            "BY_EMBED_DIM_DIV_NUM_HEADS": float(per_head),
            "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS": per_head**-0.5,
        },
    )

    def layer(reach: str, window: int | None) -> LayerConfig:
        return LayerConfig(
            attention=AttentionConfig(
                heads=fields["num_heads"],
                head_dim=fields["head_dim"],
                kv=OwnKV(heads=fields["num_kv_heads"]),
                rope=RopeConfig(
                    theta=float(fields[f"{reach}_base_frequency"]),
                    scale=float(fields[f"{reach}_scale_factor"]),
                ),
                query_scale=query_scale,
                window=window,
                softcap=fields["attn_logits_soft_cap"],
                qk_norm=NormConfig() if fields["use_qk_norm"] else None,
                qkv_axes="CNDH" if fields["num_heads"] == fields["num_kv_heads"] else "NDH,CKDH",
            ),
            ffw=Dense(
                hidden=fields["hidden_dim"],
                gate_axes="CFD" if fields["transpose_gating_einsum"] else "CDF",
            ),
            post_norm=NormConfig() if fields["use_post_attn_norm"] else None,
        )

    kinds = {"GLOBAL": layer("global", None)}
    if "LOCAL_SLIDING" in fields["attention_types"]:
        if fields["sliding_window_size"] is None:
            raise ValueError(
                "`sliding_window_size` must be set, because some layers are LOCAL_SLIDING."
            )
        kinds["LOCAL_SLIDING"] = layer("local", fields["sliding_window_size"])
    return ModelConfig(
        vocab=fields["num_embed"],
        width=fields["embed_dim"],
        layers=tuple(
            _choose({"attention_types": kind}, "attention_types", kinds)
            for kind in fields["attention_types"]
        ),
        final_softcap=fields["final_logit_softcap"],
    )


_GENERATIONS = (
    _Generation(
        name="Gemma 2 or 3",
        required=frozenset(
            {
                "attention_types",
                "embed_dim",
                "final_logit_softcap",
                "head_dim",
                "hidden_dim",
                "num_embed",
                "num_heads",
                "num_kv_heads",
                "use_post_attn_norm",
                "use_post_ffw_norm",
            }
        ),
        optional={
            "attn_logits_soft_cap": None,
            "global_base_frequency": 10_000,
            "global_scale_factor": 1.0,
            "local_base_frequency": 10_000,
            "local_scale_factor": 1.0,
            "query_pre_attn_norm": "BY_ONE_OVER_SQRT_HEAD_DIM",
            "sliding_window_size": None,
            "transpose_gating_einsum": False,
            "use_qk_norm": False,
            "vision_encoder": None,
        },
        build=_gemma2_or_3,
    ),
)
