"""Tensor names of GGUF files, and the tensors that are ignored.

Leaves are those of `_leaves.file_leaves`, which are ours but for a few.

**Source:** llama.cpp `gguf-py/gguf/tensor_mapping.py` for the names; `conversion/gemma.py` for the
scales of norms, which are what a vector is multiplied by. It leaves the rows of q and k in their
order.
"""

from collections.abc import Iterator

from equigemma.checkpoint.core._keymap import Ignore, Rule
from equigemma.checkpoint.core._layout import gate_axes, is_newer
from equigemma.checkpoint.gguf._config import DENSE, HEAD
from equigemma.checkpoint.gguf._config_gemma4 import factors_of
from equigemma.config import FeedForwardConfig, ModelConfig


FACTORS = "rope_freqs.weight"


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Names for the leaves of a model with this config."""
    q, k, v = (f"blk.{{i}}.attn_{name}.weight" for name in "qkv")
    attention = "layers.{i}.attention."
    projection = f"{attention}projection."
    return (
        Rule("embedding.weight", "token_embd.weight"),
        Rule("lm_head.weight", HEAD),
        *_norms(config),
        Rule(f"{projection}q.weight", q, axes="(N H) D -> N D H"),
        Rule(f"{projection}k.weight", k, axes="(K H) D -> K D H"),
        Rule(f"{projection}kv.weight", (k, v), axes="(K H) D -> K D H"),
        Rule(f"{projection}qkv.weight", (q, k, v), axes="(N H) D -> N D H"),
        Rule(f"{attention}query.weight", q, axes="(N H) D -> N D H"),
        Rule(f"{attention}unused.kv", (k, v), axes="(K H) D -> K D H"),
        Rule(f"{attention}unused.key_norm", "blk.{i}.attn_k_norm.weight"),
        Rule(f"{attention}output.weight", "blk.{i}.attn_output.weight", axes="D (N H) -> N H D"),
        *_dense(config),
        *_experts(),
        *_per_layer(),
        *_altup(),
        Rule("layers.{i}.skip_scale", "blk.{i}.layer_output_scale.weight"),
        Rule("factors", FACTORS),
    )


def ignored(config: ModelConfig) -> Iterator[Ignore]:
    """Names that are there and that no leaf of ours holds."""
    for name in DENSE:
        yield Ignore(f"{name}.weight", "it comes after the model")
    if is_newer(config) and factors_of(config) is not None:
        yield Ignore(FACTORS, "it is in the config")
    for index in range(len(config.layers)):
        if config.owner(index) != index:
            for part in ("attn_k", "attn_v", "attn_k_norm"):
                name = f"blk.{index}.{part}.weight"
                yield Ignore(name, "the layer attends to the keys and values of another")


def _norms(config: ModelConfig) -> Iterator[Rule]:
    names = {
        "pre_attention_norm": "attn_norm",
        "post_attention_norm": "post_attention_norm",
        "pre_ffw_norm": "ffn_norm",
        "post_ffw_norm": "post_ffw_norm",
        "attention.query_norm": "attn_q_norm",
        "attention.key_norm": "attn_k_norm",
        "ffw.pre_dense_norm": "ffn_norm",
        "ffw.post_dense_norm": "post_ffw_norm_1",
        "ffw.pre_experts_norm": "pre_ffw_norm_2",
        "ffw.post_experts_norm": "post_ffw_norm_2",
        "per_layer_gate.norm": "post_norm",
        "alternation.router_norm": "altup_router_norm",
        "laurel.norm": "laurel_post_norm",
    }
    offset = config.final_norm.offset or 0.0
    yield Rule("final_norm.scale", "output_norm.weight", offset=offset)
    for ours, theirs in names.items():
        yield Rule(f"layers.{{i}}.{ours}.scale", f"blk.{{i}}.{theirs}.weight", offset=offset)


def _dense(config: ModelConfig) -> Iterator[Rule]:
    for index, layer in enumerate(config.layers):
        ours = f"layers.{index}.ffw." + (
            "" if isinstance(layer.ffw, FeedForwardConfig) else "dense."
        )
        axes = gate_axes(config, index) if isinstance(layer.ffw, FeedForwardConfig) else "F D"
        gates = (f"blk.{index}.ffn_gate.weight", f"blk.{index}.ffn_up.weight")
        yield Rule(f"{ours}gate.weight", gates, axes=f"F D -> {axes}")
        yield Rule(f"{ours}down.weight", f"blk.{index}.ffn_down.weight", axes="D F -> F D")


def _experts() -> Iterator[Rule]:
    ours, theirs = "layers.{i}.ffw.", "blk.{i}.ffn_"
    yield Rule(f"{ours}router.scale", f"{theirs}gate_inp.scale")
    yield Rule(f"{ours}router.expert_scale", f"{theirs}down_exps.scale")
    yield Rule(f"{ours}router.logits.weight", f"{theirs}gate_inp.weight", axes="E D -> D E")
    gates = f"{theirs}gate_up_exps.weight"
    yield Rule(f"{ours}experts.gate.weight", gates, axes="E (C F) D -> E C F D")
    down = f"{theirs}down_exps.weight"
    yield Rule(f"{ours}experts.down.weight", down, axes="E D F -> E F D")


def _per_layer() -> Iterator[Rule]:
    yield Rule("per_layer.weight", "per_layer_token_embd.weight", axes="V (J P) -> V J P")
    project = "per_layer_model_proj.weight"
    yield Rule("per_layer.projection.weight", project, axes="(J P) D -> D J P")
    yield Rule("per_layer.norm.scale", "per_layer_proj_norm.weight")
    ours = "layers.{i}.per_layer_gate."
    yield Rule(f"{ours}gate.weight", "blk.{i}.inp_gate.weight", axes="P D -> D P")
    yield Rule(f"{ours}output.weight", "blk.{i}.proj.weight", axes="D P -> P D")


def _altup() -> Iterator[Rule]:
    for ours, theirs in (("spread", "altup_proj"), ("gather", "altup_unembd_proj")):
        yield Rule(f"stream.{ours}", f"{theirs}.weight", axes="A O D -> A D O")
    ours, theirs = "layers.{i}.alternation.", "blk.{i}.altup_"
    yield Rule(f"{ours}router.weight", f"{theirs}router.weight", axes="U D -> D U")
    prediction = f"{theirs}predict_coef.weight"
    yield Rule(f"{ours}prediction", prediction, axes="(to from) U -> U to from")
    yield Rule(f"{ours}correction", f"{theirs}correct_coef.weight", axes="A U -> U A")
    yield Rule(f"{ours}output_scale", f"{theirs}correct_scale.weight")
    ours, theirs = "layers.{i}.laurel.", "blk.{i}.laurel_"
    yield Rule(f"{ours}left.weight", f"{theirs}l.weight", axes="Q D -> D Q")
    yield Rule(f"{ours}right.weight", f"{theirs}r.weight", axes="D Q -> Q D")
