"""Configs of DeepMind's package to `ModelConfig`, generation by generation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from equigemma.config import (
    AltUpConfig,
    AttentionConfig,
    DensePlusMoEConfig,
    FeedForwardConfig,
    KeyIsValueConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    OwnKVConfig,
    PerLayerConfig,
    RopeConfig,
    SharedKVConfig,
)


@dataclass(frozen=True)
class Generation:
    """`required` fields have no default there, `optional` ones have the default given here."""

    name: str
    required: frozenset[str]
    optional: Mapping[str, Any]
    build: Callable[[Mapping[str, Any]], ModelConfig]

    @property
    def known(self) -> frozenset[str]:
        return self.required | frozenset(self.optional)


def _choose(fields: Mapping[str, Any], name: str, choices: Mapping[str, Any]) -> Any:
    """The choice that the field `name` makes."""
    if fields[name] not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {fields[name]!r}.")
    return choices[fields[name]]


def _query_scale(fields: Mapping[str, Any]) -> float:
    per_head = fields["embed_dim"] // fields["num_heads"]
    return _choose(
        fields,
        "query_pre_attn_norm",
        {
            "NONE": 1.0,
            "BY_ONE_OVER_SQRT_HEAD_DIM": fields["head_dim"] ** -0.5,
            "BY_EMBED_DIM_DIV_NUM_HEADS": float(per_head),
            "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS": per_head**-0.5,
        },
    )


def _rope(fields: Mapping[str, Any], reach: str, proportion: float = 1.0) -> RopeConfig:
    return RopeConfig(
        theta=float(fields[f"{reach}_base_frequency"]),
        scale=float(fields[f"{reach}_scale_factor"]),
        proportion=proportion,
    )


def _post_norm(fields: Mapping[str, Any], norm: NormConfig) -> NormConfig | None:
    if fields["use_post_attn_norm"] != fields["use_post_ffw_norm"]:
        raise ValueError(
            "`use_post_attn_norm` and `use_post_ffw_norm` must be equal, as in every published "
            f"model; got {fields['use_post_attn_norm']} and {fields['use_post_ffw_norm']}."
        )
    return norm if fields["use_post_attn_norm"] else None


def _model(
    fields: Mapping[str, Any],
    layer: Callable[[int, str, int | None], LayerConfig],
    **parts: Any,
) -> ModelConfig:
    """A model of layers `layer(index, "local" or "global", window)`."""
    if "LOCAL_SLIDING" in fields["attention_types"] and fields["sliding_window_size"] is None:
        raise ValueError(
            "`sliding_window_size` must be set, because some layers are LOCAL_SLIDING."
        )
    kinds = {"GLOBAL": ("global", None), "LOCAL_SLIDING": ("local", fields["sliding_window_size"])}
    return ModelConfig(
        vocab=fields["num_embed"],
        width=fields["embed_dim"],
        layers=tuple(
            layer(index, *_choose({"attention_types": kind}, "attention_types", kinds))
            for index, kind in enumerate(fields["attention_types"])
        ),
        final_softcap=fields["final_logit_softcap"],
        **parts,
    )


def _owner(fields: Mapping[str, Any], index: int) -> int:
    """Whose keys layer `index` attends to: of the layers before sharing starts, the last of its
    kind.

    That is how they count it: the last of these is global, the one before it is local.
    """
    sharing = fields["kv_cache_sharing_config"]
    if sharing is None:
        return index
    sharing = sharing if isinstance(sharing, Mapping) else vars(sharing)
    layers = len(fields["attention_types"])
    unshared = int(layers - sharing["frac_shared_layers"] * layers)
    is_global = fields["attention_types"][index] == "GLOBAL"
    if index < unshared or not sharing["share_global" if is_global else "share_local"]:
        return index
    return unshared - 1 if is_global else unshared - 2


def _gemma2_or_3(fields: Mapping[str, Any]) -> ModelConfig:
    def layer(index: int, reach: str, window: int | None) -> LayerConfig:
        del index
        return LayerConfig(
            attention=AttentionConfig(
                heads=fields["num_heads"],
                head_dim=fields["head_dim"],
                kv=OwnKVConfig(heads=fields["num_kv_heads"]),
                rope=_rope(fields, reach),
                query_scale=_query_scale(fields),
                window=window,
                softcap=fields["attn_logits_soft_cap"],
                qk_norm=NormConfig() if fields["use_qk_norm"] else None,
                qkv_axes="CNDH" if fields["num_heads"] == fields["num_kv_heads"] else "NDH,CKDH",
            ),
            ffw=FeedForwardConfig(
                hidden_dim=fields["hidden_dim"],
                gate_axes="CFD" if fields["transpose_gating_einsum"] else "CDF",
            ),
            post_norm=_post_norm(fields, NormConfig()),
        )

    return _model(fields, layer)


def _gemma3n(fields: Mapping[str, Any]) -> ModelConfig:
    for name in ("use_altup", "use_laurel", "use_value_norm"):
        if not fields[name]:
            raise ValueError(f"`{name}` must be true, as in every published model; got false.")
    norm = NormConfig(offset=1.0 if fields["scale_plus_one"] else 0.0)
    qk_norm = norm if fields["qk_norm_with_scale"] else NormConfig(offset=None)
    heads, kv_heads = fields["num_heads"], fields["num_kv_heads"]
    sparsity = fields["activation_sparsity_pattern"] or (0.0,) * len(fields["attention_types"])

    def layer(index: int, reach: str, window: int | None) -> LayerConfig:
        owner = _owner(fields, index)
        if owner != index and heads == kv_heads:
            raise ValueError(
                "`num_kv_heads` must differ from `num_heads` where layers share keys and values, "
                f"as in every published model; got {kv_heads} and {heads}."
            )
        return LayerConfig(
            attention=AttentionConfig(
                heads=heads,
                head_dim=fields["head_dim"],
                kv=OwnKVConfig(heads=kv_heads) if owner == index else SharedKVConfig(layer=owner),
                rope=_rope(fields, reach),
                query_scale=_query_scale(fields),
                window=window,
                softcap=fields["attn_logits_soft_cap"],
                qk_norm=qk_norm if fields["use_qk_norm"] else None,
                v_norm=NormConfig(offset=None),
                qkv_axes="CNDH" if heads == kv_heads else "NDH,CKDH",
            ),
            ffw=FeedForwardConfig(
                hidden_dim=fields["hidden_dim"],
                gate_axes="CFD" if fields["transpose_gating_einsum"] else "CDF",
                cutoff=NormalDist().inv_cdf(sparsity[index]) if sparsity[index] else None,
            ),
            pre_norm=norm,
            post_norm=_post_norm(fields, norm),
        )

    return _model(
        fields,
        layer,
        final_norm=norm,
        stream=AltUpConfig(
            streams=fields["num_altup_inputs"],
            laurel_rank=fields["laurel_rank"],
            clip=fields["altup_coef_clip"],
        ),
        per_layer=_per_layer(fields),
    )


def _per_layer(fields: Mapping[str, Any]) -> PerLayerConfig | None:
    dim = fields["per_layer_input_dim"]
    return PerLayerConfig(vocab=fields["num_embed"], dim=dim) if dim else None


def _gemma4(fields: Mapping[str, Any]) -> ModelConfig:
    norm = NormConfig(offset=0.0)
    images = fields["use_bidirectional_attention"]
    if images not in (None, "vision"):
        raise ValueError(f"`use_bidirectional_attention` must be None or vision, got {images!r}.")

    def ffw(shares: bool) -> FeedForwardConfig | DensePlusMoEConfig:
        if fields["enable_moe"]:
            return DensePlusMoEConfig(
                dense=FeedForwardConfig(hidden_dim=fields["moe_dense_hidden_dim"]),
                moe=MoEConfig(
                    num_experts=fields["num_experts"],
                    num_experts_per_token=fields["top_k_experts"],
                    hidden_dim=fields["expert_dim"],
                ),
            )
        wider = fields["override_kv_shared_ffw_hidden"] if shares else None
        return FeedForwardConfig(hidden_dim=wider or fields["hidden_dim"])

    def layer(index: int, reach: str, window: int | None) -> LayerConfig:
        kv_heads, head_dim, tied = fields["num_kv_heads"], fields["head_dim"], False
        if reach == "global":
            kv_heads = fields["num_global_kv_heads"] or kv_heads
            head_dim = fields["global_key_size"] or head_dim
            tied = fields["k_eq_v_global"]
        kv = KeyIsValueConfig(heads=kv_heads) if tied else OwnKVConfig(heads=kv_heads)
        owner = _owner(fields, index)
        return LayerConfig(
            attention=AttentionConfig(
                heads=fields["num_heads"],
                head_dim=head_dim,
                # Their tree has projections also where nothing reads them.
                kv=kv if owner == index else SharedKVConfig(layer=owner, unused=kv),
                rope=_rope(fields, reach, fields[f"{reach}_rope_proportion"]),
                query_scale=1.0,
                window=window,
                softcap=fields["attn_logits_soft_cap"],
                qk_norm=norm if fields["qk_norm_with_scale"] else NormConfig(offset=None),
                v_norm=NormConfig(offset=None),
                mask_kind="causal_bidirectional_images"
                if images and reach == "local"
                else "causal",
            ),
            ffw=ffw(owner != index),
            pre_norm=norm,
            post_norm=_post_norm(fields, norm),
            skip_scale="learned",
        )

    return _model(fields, layer, final_norm=norm, per_layer=_per_layer(fields))


_REQUIRED = frozenset(
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
)
_OPTIONAL = {
    "attn_logits_soft_cap": None,
    "global_base_frequency": 10_000,
    "global_scale_factor": 1.0,
    "local_base_frequency": 10_000,
    "local_scale_factor": 1.0,
    "sliding_window_size": None,
    "vision_encoder": None,
}
_UP_TO_3N = {
    "query_pre_attn_norm": "BY_ONE_OVER_SQRT_HEAD_DIM",
    "transpose_gating_einsum": False,
    "use_qk_norm": False,
}
_FROM_3N_ON = {
    "kv_cache_sharing_config": None,
    "per_layer_input_dim": 0,
    "qk_norm_with_scale": True,
}

GENERATIONS = (
    Generation(
        name="Gemma 2 or 3",
        required=_REQUIRED,
        optional=_OPTIONAL | _UP_TO_3N,
        build=_gemma2_or_3,
    ),
    Generation(
        name="Gemma 3n",
        required=_REQUIRED,
        optional=_OPTIONAL
        | _UP_TO_3N
        | _FROM_3N_ON
        | {
            "activation_sparsity_pattern": None,
            "altup_coef_clip": None,
            "guard_against_excess_precision": False,
            "laurel_rank": 64,
            "num_altup_inputs": 4,
            "scale_plus_one": True,
            "use_altup": False,
            "use_laurel": False,
            "use_value_norm": False,
        },
        build=_gemma3n,
    ),
    Generation(
        name="Gemma 4",
        # Without default proportions of rotation their model does not run.
        required=_REQUIRED | {"global_rope_proportion", "local_rope_proportion"},
        optional=_OPTIONAL
        | _FROM_3N_ON
        | {
            "audio_encoder": None,
            "enable_moe": False,
            "expert_dim": 0,
            "global_key_size": None,
            "k_eq_v_global": False,
            "moe_dense_hidden_dim": 0,
            "num_experts": 0,
            "num_global_kv_heads": None,
            "override_kv_shared_ffw_hidden": None,
            "top_k_experts": 8,
            "use_bidirectional_attention": None,
        },
        build=_gemma4,
    ),
)
