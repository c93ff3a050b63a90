"""Names of DeepMind's parameter trees: `layer_0/attn/q_einsum/w`.

Axes are stored as in ours, so both ways are pure renames: no array is copied, cast or transposed.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax

from equigemma.checkpoint._keymap import Rule, fill, leaf_shapes, leaves, plan
from equigemma.config import ModelConfig
from equigemma.nn import Transformer


RULES = (
    Rule("embedding.weight", "embedder/input_embedding"),
    Rule("final_norm.scale", "final_norm/scale"),
    Rule("layers.{i}.pre_attention_norm.scale", "layer_{i}/pre_attention_norm/scale"),
    Rule("layers.{i}.post_attention_norm.scale", "layer_{i}/post_attention_norm/scale"),
    Rule("layers.{i}.pre_ffw_norm.scale", "layer_{i}/pre_ffw_norm/scale"),
    Rule("layers.{i}.post_ffw_norm.scale", "layer_{i}/post_ffw_norm/scale"),
    Rule("layers.{i}.attention.projection.q.weight", "layer_{i}/attn/q_einsum/w"),
    Rule("layers.{i}.attention.projection.kv.weight", "layer_{i}/attn/kv_einsum/w"),
    Rule("layers.{i}.attention.projection.qkv.weight", "layer_{i}/attn/qkv_einsum/w"),
    Rule("layers.{i}.attention.query_norm.scale", "layer_{i}/attn/_query_norm/scale"),
    Rule("layers.{i}.attention.key_norm.scale", "layer_{i}/attn/_key_norm/scale"),
    Rule("layers.{i}.attention.output.weight", "layer_{i}/attn/attn_vec_einsum/w"),
    Rule("layers.{i}.ffw.gate.weight", "layer_{i}/mlp/gating_einsum"),
    Rule("layers.{i}.ffw.down.weight", "layer_{i}/mlp/linear"),
)


def to_params(model: Transformer) -> dict[str, Any]:
    """The model's leaves as DeepMind's nested tree of dicts."""
    values = dict(leaves(model))
    tree: dict[str, Any] = {}
    for assignment in plan(leaf_shapes(model), RULES):
        *parents, name = assignment.keys[0].split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = values[assignment.path]
    return tree


def from_params(config: ModelConfig, params: Mapping[str, Any]) -> Transformer:
    """A model around the arrays of DeepMind's nested tree.

    **Raises:** `CheckpointError` listing every missing, extra or misshaped parameter.
    """
    flat = dict(_flatten(params))
    model = skeleton(config)
    shapes = {key: value.shape for key, value in flat.items()}
    assignments = plan(leaf_shapes(model), RULES, shapes)
    return fill(model, {entry.path: flat[entry.keys[0]] for entry in assignments})


def skeleton(config: ModelConfig) -> Transformer:
    """The model's tree with shapes in place of arrays; allocates nothing."""
    return eqx.filter_eval_shape(Transformer, config, key=jax.random.key(0))


def _flatten(tree: Mapping[str, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
