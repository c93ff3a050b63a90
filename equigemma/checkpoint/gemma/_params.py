"""Names of DeepMind's parameter trees: `layer_0/attn/q_einsum/w`.

Axes are stored as in ours, so both ways are pure renames: no array is copied, cast or transposed.
"""

from collections.abc import Mapping
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._keymap import Rule, fill, leaf_shapes, leaves, plan
from equigemma.checkpoint.core._skeleton import skeleton
from equigemma.config import AltUpConfig, ModelConfig
from equigemma.nn import Transformer


_COMMON = (
    Rule("embedding.weight", "embedder/input_embedding"),
    Rule("final_norm.scale", "final_norm/scale"),
    Rule("layers.{i}.pre_attention_norm.scale", "layer_{i}/pre_attention_norm/scale"),
    Rule("layers.{i}.post_attention_norm.scale", "layer_{i}/post_attention_norm/scale"),
    Rule("layers.{i}.pre_ffw_norm.scale", "layer_{i}/pre_ffw_norm/scale"),
    Rule("layers.{i}.post_ffw_norm.scale", "layer_{i}/post_ffw_norm/scale"),
    Rule("layers.{i}.attention.projection.q.weight", "layer_{i}/attn/q_einsum/w"),
    Rule("layers.{i}.attention.projection.kv.weight", "layer_{i}/attn/kv_einsum/w"),
    Rule("layers.{i}.attention.projection.k.weight", "layer_{i}/attn/k_einsum/w"),
    Rule("layers.{i}.attention.projection.qkv.weight", "layer_{i}/attn/qkv_einsum/w"),
    Rule("layers.{i}.attention.query.weight", "layer_{i}/attn/q_einsum/w"),
    Rule("layers.{i}.attention.unused.kv", "layer_{i}/attn/kv_einsum/w"),
    Rule("layers.{i}.attention.unused.k", "layer_{i}/attn/k_einsum/w"),
    Rule("layers.{i}.attention.unused.key_norm", "layer_{i}/attn/key_norm/scale"),
    Rule("layers.{i}.attention.output.weight", "layer_{i}/attn/attn_vec_einsum/w"),
    Rule("layers.{i}.ffw.gate.weight", "layer_{i}/mlp/gating_einsum"),
    Rule("layers.{i}.ffw.down.weight", "layer_{i}/mlp/linear"),
    Rule("layers.{i}.ffw.pre_dense_norm.scale", "layer_{i}/pre_ffw2_norm/scale"),
    Rule("layers.{i}.ffw.dense.gate.weight", "layer_{i}/mlp2/gating_einsum"),
    Rule("layers.{i}.ffw.dense.down.weight", "layer_{i}/mlp2/linear"),
    Rule("layers.{i}.ffw.post_dense_norm.scale", "layer_{i}/post_ffw2_norm/scale"),
    Rule("layers.{i}.ffw.router.scale", "layer_{i}/mlp/router_scale"),
    Rule("layers.{i}.ffw.router.logits.weight", "layer_{i}/mlp/router_logits/w"),
    Rule("layers.{i}.ffw.router.expert_scale", "layer_{i}/mlp/per_expert_scale"),
    Rule("layers.{i}.ffw.pre_experts_norm.scale", "layer_{i}/pre_ffw_norm/scale"),
    Rule("layers.{i}.ffw.experts.gate.weight", "layer_{i}/mlp/gating_einsum/w"),
    Rule("layers.{i}.ffw.experts.down.weight", "layer_{i}/mlp/linear/w"),
    Rule("layers.{i}.ffw.post_experts_norm.scale", "layer_{i}/post_ffw1_norm/scale"),
    Rule("layers.{i}.skip_scale", "layer_{i}/skip_scale"),
)
_NORMS = (
    Rule("layers.{i}.attention.query_norm.scale", "layer_{i}/attn/query_norm/scale"),
    Rule("layers.{i}.attention.key_norm.scale", "layer_{i}/attn/key_norm/scale"),
)
_NORMS_WITHOUT_VALUE_NORM = (
    Rule("layers.{i}.attention.query_norm.scale", "layer_{i}/attn/_query_norm/scale"),
    Rule("layers.{i}.attention.key_norm.scale", "layer_{i}/attn/_key_norm/scale"),
)
_PLAIN_STREAM = (
    Rule("per_layer.weight", "embedder/per_layer_embeddings"),
    Rule("per_layer.projection.weight", "embedder/per_layer_model_projection/w"),
    Rule("per_layer.norm.scale", "embedder/per_layer_projection_norm/scale"),
    Rule("layers.{i}.per_layer_gate.gate.weight", "layer_{i}/per_layer_input_gate/w"),
    Rule("layers.{i}.per_layer_gate.output.weight", "layer_{i}/per_layer_projection/w"),
    Rule("layers.{i}.per_layer_gate.norm.scale", "layer_{i}/post_per_layer_input_norm/scale"),
)
_GATE = "layer_{i}/per_layer_mapping"
_ALTUP_STREAM = (
    Rule("per_layer.weight", "embedder/per_layer_input_embedding"),
    Rule("per_layer.projection.weight", "embedder/per_layer_input_projection/w"),
    Rule("per_layer.norm.scale", "embedder/per_layer_projection_norm/scale"),
    Rule("layers.{i}.per_layer_gate.gate.weight", f"{_GATE}/per_layer_input_gate/w"),
    Rule("layers.{i}.per_layer_gate.output.weight", f"{_GATE}/per_layer_projection/w"),
    Rule("layers.{i}.per_layer_gate.norm.scale", f"{_GATE}/post_per_layer_input_norm/scale"),
    Rule("stream.spread.{k}.weight", "altup_projection_{k}/altup_projection_{k}"),
    Rule("stream.gather.{k}.weight", "altup_unembed_projection_{k}/altup_unembed_projection_{k}"),
    Rule("layers.{i}.alternation.router_norm.scale", "layer_{i}/altup/router_norm_layer/scale"),
    Rule("layers.{i}.alternation.router.weight", "layer_{i}/altup/modality_router/w"),
    Rule("layers.{i}.alternation.prediction", "layer_{i}/altup/prediction_coefs"),
    Rule("layers.{i}.alternation.correction", "layer_{i}/altup/correction_coefs"),
    Rule("layers.{i}.alternation.output_scale", "layer_{i}/altup/correct_output_scale"),
    Rule("layers.{i}.laurel.left.weight", "layer_{i}/laurel/linear_left/w"),
    Rule("layers.{i}.laurel.right.weight", "layer_{i}/laurel/linear_right/w"),
    Rule("layers.{i}.laurel.norm.scale", "layer_{i}/post_laurel_norm/scale"),
)
_TOWER = "vision_encoder/siglip_encoder"
_BLOCK = f"{_TOWER}/Transformer/encoderblock_{{i}}"
_AFFINE = (
    ("patches", f"{_TOWER}/embedding"),
    *(
        (f"layers.{{i}}.{ours}", f"{_BLOCK}/{theirs}")
        for ours, theirs in (
            ("attention.query", "MultiHeadDotProductAttention_0/query"),
            ("attention.key", "MultiHeadDotProductAttention_0/key"),
            ("attention.value", "MultiHeadDotProductAttention_0/value"),
            ("attention.output", "MultiHeadDotProductAttention_0/out"),
            ("up", "MlpBlock_0/Dense_0"),
            ("down", "MlpBlock_0/Dense_1"),
        )
    ),
)
_LAYER_NORMS = (
    ("layers.{i}.attention_norm", f"{_BLOCK}/LayerNorm_0"),
    ("layers.{i}.ffw_norm", f"{_BLOCK}/LayerNorm_1"),
    ("final_norm", f"{_TOWER}/Transformer/encoder_norm"),
)
_VISION = (
    Rule("vision.tower.positions", f"{_TOWER}/pos_embedding"),
    *(Rule(f"vision.tower.{ours}.linear.weight", f"{to}/kernel") for ours, to in _AFFINE),
    *(Rule(f"vision.tower.{ours}.scale", f"{to}/scale") for ours, to in _LAYER_NORMS),
    *(Rule(f"vision.tower.{ours}.bias", f"{to}/bias") for ours, to in (*_AFFINE, *_LAYER_NORMS)),
    Rule("vision.norm.scale", "embedder/mm_soft_embedding_norm/scale"),
    Rule("vision.projection.weight", "embedder/mm_input_projection/w"),
)

# What reads images and sounds: a model of text does without, as DeepMind's does.
_SEES = ("vision_encoder/", "embedder/mm_")
_HEARS = ("audio_encoder/", "embedder/audio_")


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The names of a model's weights. Some parts have other names where they came with others."""
    value_norm = any(layer.attention.v_norm is not None for layer in config.layers)
    return (
        *_COMMON,
        *(_NORMS if value_norm else _NORMS_WITHOUT_VALUE_NORM),
        *(_ALTUP_STREAM if isinstance(config.stream, AltUpConfig) else _PLAIN_STREAM),
        *_VISION,
    )


def check_tied(config: ModelConfig) -> None:
    """Refuses a model with an output projection of its own.

    **Raises:** `CheckpointError`.
    """
    if config.lm_head == "untied":
        raise CheckpointError(
            "DeepMind's models give logits with their embedding, and have no place for this "
            "model's lm_head; a folder in the layout of Hugging Face has."
        )


def names(model: Transformer) -> dict[str, str]:
    """DeepMind's name of every leaf, by our path.

    **Raises:** `CheckpointError` if the model has an output projection of its own.
    """
    check_tied(model.config)
    assignments = plan(leaf_shapes(model), rules(model.config))
    return {assignment.path: assignment.keys[0] for assignment in assignments}


def to_params(model: Transformer) -> dict[str, Any]:
    """The model's leaves as DeepMind's nested tree of dicts."""
    values = dict(leaves(model))
    tree: dict[str, Any] = {}
    for path, key in names(model).items():
        *parents, name = key.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = values[path]
    return tree


def from_params(config: ModelConfig, params: Mapping[str, Any]) -> Transformer:
    """A model around the arrays of DeepMind's nested tree.

    Parameters of towers that the model has not are left aside. A model whose vision tower has no
    parameters at all is made without.

    **Raises:** `CheckpointError` listing every missing, extra or misshaped parameter.
    """
    check_tied(config)
    flat = {key: value for key, value in _flatten(params) if not key.startswith(_HEARS)}
    if config.vision is None or not any(key.startswith(_SEES) for key in flat):
        config = config.text_only()
        flat = {key: value for key, value in flat.items() if not key.startswith(_SEES)}
    model = skeleton(config)
    shapes = {key: value.shape for key, value in flat.items()}
    assignments = plan(leaf_shapes(model), rules(config), shapes)
    return fill(model, {entry.path: flat[entry.keys[0]] for entry in assignments})


def _flatten(tree: Mapping[str, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
