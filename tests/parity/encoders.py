"""Weights of `transformers`' encoders put into ours by hand, leaf by leaf."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch


FUZZ = 500
"""Examples of hypothesis, random sizes or lengths."""


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that matter, norms and buffers too; bounds that cut off a part of every tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            scale = 0.5 if weight.ndim < 2 else weight[0].numel() ** -0.5
            weight.normal_(0, scale, generator=generator)
        for name, buffer in model.named_buffers():
            leaf = name.split(".")[-1]
            if leaf in ("input_min", "output_min", "input_max", "output_max"):
                # Of numbers with standard deviation 1, about a tenth is beyond each.
                bound = 1.2 + 0.3 * torch.rand((), generator=generator)
                buffer.copy_(-bound if leaf.endswith("min") else bound)
            elif leaf in ("std_bias", "std_scale"):
                buffer.normal_(0, 1, generator=generator)


def array(tensor: torch.Tensor, dtype=jnp.float32) -> jnp.ndarray:
    return jnp.asarray(np.asarray(tensor.detach().numpy()), dtype)


def put(module: eqx.Module, leaves: dict[str, Any]) -> Any:
    """`module` with new leaves, by their paths; every array must be named once."""
    paths, structure = jax.tree_util.tree_flatten_with_path(module)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    assert sorted(names) == sorted(leaves)
    for name, (_, before) in zip(names, paths, strict=True):
        assert before.shape == leaves[name].shape, (name, before.shape, leaves[name].shape)
    return jax.tree.unflatten(structure, [leaves[name] for name in names])


def clipped(ours: str, theirs: Any, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The leaves of a `ClippedLinear`."""
    weight = array(theirs.linear.weight)
    leaves = {f"{ours}.linear.weight": weight if shape is None else weight.reshape(shape)}
    if theirs.use_clipped_linears:
        bounds = (theirs.input_min, theirs.input_max, theirs.output_min, theirs.output_max)
        leaves[f"{ours}.bounds"] = array(torch.stack(bounds))
    return leaves


def vision_leaves(tower: Any, embedder: Any, heads: int, head_dim: int) -> dict[str, Any]:
    """Those of a `nn.VisionEncoder`: their `vision_tower` and `embed_vision`."""
    leaves = {
        "tower.patches.weight": array(tower.patch_embedder.input_proj.weight),
        "tower.positions": array(tower.patch_embedder.position_embedding_table),
        "projection.weight": array(embedder.embedding_projection.weight),
    }
    if tower.config.standardize:
        leaves["standardize.bias"] = array(tower.std_bias)
        leaves["standardize.scale"] = array(tower.std_scale)
    for index, layer in enumerate(tower.encoder.layers):
        ours = f"tower.layers.{index}"
        attention, mlp = layer.self_attn, layer.mlp
        width = attention.q_proj.linear.weight.shape[1]
        for name, part in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            shape = (heads, head_dim, width)
            leaves |= clipped(f"{ours}.attention.{name}", getattr(attention, part), shape)
        shape = (width, heads, head_dim)
        leaves |= clipped(f"{ours}.attention.output", attention.o_proj, shape)
        leaves[f"{ours}.attention.query_norm.scale"] = array(attention.q_norm.weight)
        leaves[f"{ours}.attention.key_norm.scale"] = array(attention.k_norm.weight)
        for name in ("gate", "up", "down"):
            leaves |= clipped(f"{ours}.{name}", getattr(mlp, f"{name}_proj"))
        for name, part in (
            ("pre_attention_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("pre_ffw_norm", "pre_feedforward_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ):
            leaves[f"{ours}.{name}.scale"] = array(getattr(layer, part).weight)
    return leaves


def audio_leaves(tower: Any, embedder: Any) -> dict[str, Any]:
    """Those of a `nn.AudioEncoder`: their `audio_tower` and `embed_audio`."""
    first, second = (
        getattr(tower.subsample_conv_projection, name) for name in ("layer0", "layer1")
    )
    leaves = {
        "subsampling.convolutions.0.weight": array(first.conv.weight),
        "subsampling.convolutions.0.norm.scale": array(first.norm.weight),
        "subsampling.convolutions.1.weight": array(second.conv.weight),
        "subsampling.convolutions.1.norm.scale": array(second.norm.weight),
        "subsampling.projection.weight": array(
            tower.subsample_conv_projection.input_proj_linear.weight
        ),
        "output.linear.weight": array(tower.output_proj.weight),
        "output.bias": array(tower.output_proj.bias),
        "projection.weight": array(embedder.embedding_projection.weight),
    }
    for index, layer in enumerate(tower.layers):
        leaves |= _conformer_leaves(f"layers.{index}", layer)
    return leaves


def _conformer_leaves(ours: str, layer: Any) -> dict[str, Any]:
    attention, convolution = layer.self_attn, layer.lconv1d
    heads, head_dim = attention.num_heads, attention.head_dim
    width = heads * head_dim
    leaves = {
        f"{ours}.pre_attention_norm.scale": array(layer.norm_pre_attn.weight),
        f"{ours}.post_attention_norm.scale": array(layer.norm_post_attn.weight),
        f"{ours}.final_norm.scale": array(layer.norm_out.weight),
        f"{ours}.attention.query_scale": array(attention.per_dim_scale),
        f"{ours}.attention.relative.weight": array(attention.relative_k_proj.weight).reshape(
            heads, head_dim, width
        ),
        f"{ours}.convolution.pre_norm.scale": array(convolution.pre_layer_norm.weight),
        f"{ours}.convolution.convolution_norm.scale": array(convolution.conv_norm.weight),
        f"{ours}.convolution.weight": array(convolution.depthwise_conv1d.weight)[:, 0],
    }
    for name, part in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        shape = (heads, head_dim, width)
        leaves |= clipped(f"{ours}.attention.{name}", getattr(attention, part), shape)
    leaves |= clipped(f"{ours}.attention.output", attention.post, (width, heads, head_dim))
    leaves |= clipped(f"{ours}.convolution.gate", convolution.linear_start, (2, width, width))
    leaves |= clipped(f"{ours}.convolution.output", convolution.linear_end)
    for name, ffw in (("first_ffw", layer.feed_forward1), ("second_ffw", layer.feed_forward2)):
        leaves[f"{ours}.{name}.pre_norm.scale"] = array(ffw.pre_layer_norm.weight)
        leaves[f"{ours}.{name}.post_norm.scale"] = array(ffw.post_layer_norm.weight)
        leaves |= clipped(f"{ours}.{name}.up", ffw.ffw_layer_1)
        leaves |= clipped(f"{ours}.{name}.down", ffw.ffw_layer_2)
    return leaves


def patch_leaves(embedder: Any) -> dict[str, Any]:
    """Those of a `nn.PatchEmbedder`: their `embed_vision` of a model without encoders."""
    leaves = {
        "patches.linear.weight": array(embedder.patch_dense.weight),
        "patches.bias": array(embedder.patch_dense.bias),
        "positions": array(embedder.pos_embedding.transpose(0, 1)),
        "projection.weight": array(embedder.multimodal_embedder.embedding_projection.weight),
    }
    for ours, theirs in (
        ("patch_norm", embedder.patch_ln1),
        ("embedding_norm", embedder.patch_ln2),
        ("position_norm", embedder.pos_norm),
    ):
        leaves[f"{ours}.scale"] = array(theirs.weight)
        leaves[f"{ours}.bias"] = array(theirs.bias)
    return leaves
