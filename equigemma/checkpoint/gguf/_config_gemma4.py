"""Gemma 4: metadata of a GGUF file to a `ModelConfig` and back.

What it shares with Gemma 3n is in `_config_shared.py`.

**Source:** llama.cpp `src/models/gemma4.cpp` (`load_arch_hparams`), `conversion/gemma.py` for what
is written.
"""

from dataclasses import replace

import numpy as np

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._fields import short
from equigemma.checkpoint.gguf._config_shared import (
    Described,
    Source,
    describe_model,
    describe_sharing,
    first_local,
    owners_of,
    read_attention,
    read_norm,
    read_sizes,
    with_norms,
)
from equigemma.checkpoint.gguf._options import Options
from equigemma.config import (
    AltUpConfig,
    AttentionConfig,
    DensePlusMoEConfig,
    FeedForwardConfig,
    KeyIsValueConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    OwnKVConfig,
    PerLayerConfig,
    SharedKVConfig,
)


GEMMA4 = "gemma4"
_CAP = 30.0
# Angles are divided by these: one that does not turn is written as a wavelength without end.
_TURNS, _STANDS = 1.0, 1e30


def read_gemma4(source: Source) -> ModelConfig:
    """The config that a file describes."""
    options, vocab, limits = source.options, source.vocab, source.limits
    width, count, hidden = read_sizes(options, vocab, limits)
    heads_kv = options.sizes("attention.head_count_kv", count)
    far, near = read_attention(options, width)
    near = replace(near, head_dim=options.size("attention.key_length_swa", far.head_dim))
    options.expect("attention.value_length_swa", near.head_dim)
    options.expect("rope.dimension_count_swa", near.head_dim)
    dim = options.size("embedding_length_per_layer_input", 0, least=0)
    moe = _read_moe(options)
    sizes = [max(hidden), *(each.heads * each.head_dim for each in (far, near))]
    sizes += [] if moe is None else [2 * moe.num_experts * moe.hidden_dim]
    limits.check(count, (*(size * width for size in sizes), vocab * dim * count))
    norm = read_norm(options)
    is_local = _read_listed(options, count)
    if not all(is_local):
        proportion = _proportion(source.factors, far.head_dim)
        far = replace(far, rope=replace(far.rope, proportion=proportion))
    if not dim:
        # The models without a second embedding are those that were trained on images so.
        near = replace(near, mask_kind="causal_bidirectional_images")
    owners = owners_of(is_local, options.size("attention.shared_kv_layers", 0, least=0))

    def layer(index: int) -> LayerConfig:
        has_values = f"blk.{index}.attn_v.weight" in source.tensors
        is_scaled = f"blk.{index}.layer_output_scale.weight" in source.tensors
        own = (OwnKVConfig if has_values else KeyIsValueConfig)(heads=heads_kv[index])
        kv = own if owners[index] == index else SharedKVConfig(layer=owners[index])
        dense = FeedForwardConfig(hidden_dim=hidden[index])
        return LayerConfig(
            attention=with_norms(near if is_local[index] else far, norm, kv),
            ffw=dense if moe is None else DensePlusMoEConfig(dense=dense, moe=moe),
            pre_norm=norm,
            post_norm=norm,
            skip_scale="learned" if is_scaled else None,
        )

    return ModelConfig(
        vocab=vocab,
        width=width,
        layers=tuple(map(layer, range(count))),
        final_norm=norm,
        final_softcap=options.number("final_logit_softcapping", _CAP) or None,
        per_layer=PerLayerConfig(vocab=vocab, dim=dim, norm=norm) if dim else None,
    )


def _read_listed(options: Options, count: int) -> list[bool]:
    listed = options.optional("attention.sliding_window_pattern", None)
    if not isinstance(listed, list) or len(listed) != count:
        raise CheckpointError(
            f"its attention.sliding_window_pattern must have an entry for each of {count} layers; "
            f"got {short(listed)}."
        )
    return [bool(here) for here in listed]


def _read_moe(options: Options) -> MoEConfig | None:
    experts = options.size("expert_count", 0, least=0)
    if not experts:
        return None
    chosen, hidden = (
        options.size(key) for key in ("expert_used_count", "expert_feed_forward_length")
    )
    return MoEConfig(num_experts=experts, num_experts_per_token=chosen, hidden_dim=hidden)


def _proportion(factors: np.ndarray | None, head_dim: int) -> float:
    """The share of a head that turns."""
    pairs = 0 if factors is None else int((factors == _TURNS).sum())
    if factors is None or not pairs or not np.array_equal(factors, _factors(pairs, head_dim)):
        raise CheckpointError(
            f"its rope_freqs.weight must be {head_dim // 2} numbers, first {_TURNS} where an angle "
            f"of a global layer turns, then {_STANDS} where none does."
        )
    return 2 * pairs / head_dim


def _factors(pairs: int, head_dim: int) -> np.ndarray:
    return np.where(np.arange(head_dim // 2) < pairs, _TURNS, _STANDS).astype(np.float32)


def factors_of(config: ModelConfig) -> np.ndarray | None:
    """What llama.cpp divides the angles of global layers by, if it wants to be told."""
    far = next((each.attention for each in config.layers if each.attention.window is None), None)
    if far is None or isinstance(config.stream, AltUpConfig):
        return None
    return _factors(turning(far), far.head_dim)


def turning(attention: AttentionConfig) -> int:
    """How many pairs of each head turn, as `nn` has it."""
    return int(attention.rope.proportion * attention.head_dim // 2)


def describe_gemma4(config: ModelConfig) -> Described:
    """What is said of a model; reading it back shows whether that was enough."""
    told = describe_model(config)
    near = first_local(config)
    told |= describe_sharing(config) | {
        "attention.key_length_swa": near.head_dim,
        "attention.value_length_swa": near.head_dim,
        "rope.dimension_count": told["attention.key_length"],
        "rope.dimension_count_swa": near.head_dim,
        "final_logit_softcapping": config.final_softcap or 0.0,
    }
    ffw = config.layers[0].ffw
    if isinstance(ffw, DensePlusMoEConfig):
        told |= {
            "expert_count": ffw.moe.num_experts,
            "expert_used_count": ffw.moe.num_experts_per_token,
            "expert_feed_forward_length": ffw.moe.hidden_dim,
        }
    return Described(GEMMA4, told, {})
