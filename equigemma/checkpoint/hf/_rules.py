"""Tensor names of Hugging Face folders, and the tensors that are ignored.

**Source:** transformers `models/gemma*/modeling_gemma*.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from equigemma.checkpoint.core._keymap import Ignore, Rule
from equigemma.checkpoint.core._layout import gate_axes, is_gemma2_without_post_norms
from equigemma.checkpoint.core._tower_rules import TowerNames, tower_rules
from equigemma.config import FeedForwardConfig, ModelConfig


TOWER = "vision_tower.vision_model."
HEADS = ("lm_head.weight", "language_model.lm_head.weight")


@dataclass(frozen=True)
class Names:
    """What releases and towers make different in the names of one model."""

    prefix: str = "model."
    """In front of the names of the text model."""
    tower: str = TOWER
    """In front of those of the vision tower."""
    head: str = ""
    """Of the output projection."""
    embedding: str = ""
    """Of the embedding, where it is not under `prefix`: a tied head may stand for it."""


def names_of(prefix: str) -> Names:
    """The names of published files that have `prefix` in front."""
    return Names(prefix, head=HEADS[prefix == "language_model.model."])


def rules(config: ModelConfig, names: Names = names_of("model.")) -> tuple[Rule, ...]:
    """Names for the leaves of a model with this config."""
    prefix = names.prefix
    layer = f"{prefix}layers.{{i}}."
    q, k, v = (f"{layer}self_attn.{name}_proj.weight" for name in "qkv")
    projection = "layers.{i}.attention.projection."
    return (
        Rule("embedding.weight", names.embedding or f"{prefix}embed_tokens.weight"),
        Rule("lm_head.weight", names.head),
        Rule("final_norm.scale", f"{prefix}norm.weight"),
        *_norms(config, layer),
        Rule(f"{projection}q.weight", q, axes="(N H) D -> N D H"),
        Rule(f"{projection}k.weight", k, axes="(K H) D -> K D H"),
        Rule(f"{projection}kv.weight", (k, v), axes="(K H) D -> K D H"),
        Rule(f"{projection}qkv.weight", (q, k, v), axes="(N H) D -> N D H"),
        Rule("layers.{i}.attention.query.weight", q, axes="(N H) D -> N D H"),
        Rule("layers.{i}.attention.unused.k", k, axes="(K H) D -> K D H"),
        Rule("layers.{i}.attention.unused.kv", (k, v), axes="(K H) D -> K D H"),
        Rule("layers.{i}.attention.unused.key_norm", f"{layer}self_attn.k_norm.weight"),
        Rule(
            "layers.{i}.attention.output.weight",
            f"{layer}self_attn.o_proj.weight",
            axes="D (N H) -> N H D",
        ),
        *_dense(config, prefix),
        *_experts(layer),
        *_per_layer(prefix, layer),
        *_altup(prefix, layer),
        *_vision(names.tower),
        Rule("layers.{i}.skip_scale", f"{layer}layer_scalar"),
    )


def ignored(config: ModelConfig, names: Names) -> Iterator[Ignore]:
    """Names that are there and that nothing here needs."""
    if config.lm_head == "tied":
        for head in HEADS:
            yield Ignore(head, "it is the embedding once more")
    towers = ("audio_tower", "embed_vision", "embed_audio", "vision_embedder")
    if config.vision is None:
        towers = ("vision_tower", "multi_modal_projector", *towers)
    yield Ignore(
        f"{names.tower}head.*", "the soft tokens are made from all patches, not from one vector"
    )
    for front in ("", "model."):
        for part in towers:
            yield Ignore(f"{front}{part}.*", "only the text part of the model is read")
    yield Ignore("*.rotary_emb.inv_freq", "it follows from the config")
    for index in range(len(config.layers)):
        if config.owner(index) != index:
            for part in ("k_proj", "v_proj", "k_norm"):
                name = f"{names.prefix}layers.{index}.self_attn.{part}.weight"
                yield Ignore(name, "the layer attends to the keys and values of another")


def _norms(config: ModelConfig, layer: str) -> Iterator[Rule]:
    # Where there may be a norm after each sub-layer, the one before the feed-forward has another
    # name.
    has_post = config.layers[0].post_norm is not None
    is_later = has_post or is_gemma2_without_post_norms(config)
    names = {
        "pre_attention_norm": "input_layernorm",
        "pre_ffw_norm": "pre_feedforward_layernorm" if is_later else "post_attention_layernorm",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "ffw.pre_dense_norm": "pre_feedforward_layernorm",
        "ffw.post_dense_norm": "post_feedforward_layernorm_1",
        "ffw.pre_experts_norm": "pre_feedforward_layernorm_2",
        "ffw.post_experts_norm": "post_feedforward_layernorm_2",
        "per_layer_gate.norm": "post_per_layer_input_norm",
        "alternation.router_norm": "altup.router_norm",
        "laurel.norm": "laurel.post_laurel_norm",
    }
    if has_post:
        names["post_attention_norm"] = "post_attention_layernorm"
        names["post_ffw_norm"] = "post_feedforward_layernorm"
    for ours, theirs in names.items():
        yield Rule(f"layers.{{i}}.{ours}.scale", f"{layer}{theirs}.weight")


def _dense(config: ModelConfig, prefix: str) -> Iterator[Rule]:
    for index, layer in enumerate(config.layers):
        mlp = f"{prefix}layers.{index}.mlp."
        ours = f"layers.{index}.ffw." + (
            "" if isinstance(layer.ffw, FeedForwardConfig) else "dense."
        )
        axes = gate_axes(config, index) if isinstance(layer.ffw, FeedForwardConfig) else "F D"
        gates = (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
        yield Rule(f"{ours}gate.weight", gates, axes=f"F D -> {axes}")
        yield Rule(f"{ours}down.weight", f"{mlp}down_proj.weight", axes="D F -> F D")


def _experts(layer: str) -> Iterator[Rule]:
    ours = "layers.{i}.ffw."
    yield Rule(f"{ours}router.scale", f"{layer}router.scale")
    yield Rule(f"{ours}router.expert_scale", f"{layer}router.per_expert_scale")
    yield Rule(f"{ours}router.logits.weight", f"{layer}router.proj.weight", axes="E D -> D E")
    gates = f"{layer}experts.gate_up_proj"
    yield Rule(f"{ours}experts.gate.weight", gates, axes="E (C F) D -> E C F D")
    yield Rule(f"{ours}experts.down.weight", f"{layer}experts.down_proj", axes="E D F -> E F D")


def _per_layer(prefix: str, layer: str) -> Iterator[Rule]:
    table, project = f"{prefix}embed_tokens_per_layer", f"{prefix}per_layer_model_projection"
    yield Rule("per_layer.weight", f"{table}.weight", axes="V (J P) -> V J P")
    yield Rule("per_layer.projection.weight", f"{project}.weight", axes="(J P) D -> D J P")
    yield Rule("per_layer.norm.scale", f"{prefix}per_layer_projection_norm.weight")
    ours = "layers.{i}.per_layer_gate."
    yield Rule(f"{ours}gate.weight", f"{layer}per_layer_input_gate.weight", axes="P D -> D P")
    yield Rule(f"{ours}output.weight", f"{layer}per_layer_projection.weight", axes="D P -> P D")


def _vision(tower: str) -> Iterator[Rule]:
    layer = f"{tower}encoder.layers.{{i}}."
    projector = tower.partition("vision_tower.")[0] + "multi_modal_projector."
    names = TowerNames(
        patches=f"{tower}embeddings.patch_embedding",
        positions=f"{tower}embeddings.position_embedding",
        attention_norm=f"{layer}layer_norm1",
        query=f"{layer}self_attn.q_proj",
        key=f"{layer}self_attn.k_proj",
        value=f"{layer}self_attn.v_proj",
        output=f"{layer}self_attn.out_proj",
        ffw_norm=f"{layer}layer_norm2",
        up=f"{layer}mlp.fc1",
        down=f"{layer}mlp.fc2",
        final_norm=f"{tower}post_layernorm",
        norm=f"{projector}mm_soft_emb_norm",
        projection=f"{projector}mm_input_projection_weight",
    )
    return tower_rules(names)


def _altup(prefix: str, layer: str) -> Iterator[Rule]:
    for ours, theirs in (("spread", "altup_projections"), ("gather", "altup_unembed_projections")):
        name = f"{prefix}{theirs}.{{k}}.weight"
        yield Rule(f"stream.{ours}.{{k}}.weight", name, axes="O D -> D O")
    ours, theirs = "layers.{i}.alternation.", f"{layer}altup."
    yield Rule(f"{ours}router.weight", f"{theirs}modality_router.weight", axes="U D -> D U")
    prediction = f"{theirs}prediction_coefs.weight"
    yield Rule(f"{ours}prediction", prediction, axes="(to from) U -> U to from")
    yield Rule(f"{ours}correction", f"{theirs}correction_coefs.weight", axes="A U -> U A")
    yield Rule(f"{ours}output_scale", f"{theirs}correct_output_scale")
    ours, theirs = "layers.{i}.laurel.", f"{layer}laurel."
    yield Rule(f"{ours}left.weight", f"{theirs}linear_left.weight", axes="Q D -> D Q")
    yield Rule(f"{ours}right.weight", f"{theirs}linear_right.weight", axes="D Q -> Q D")
