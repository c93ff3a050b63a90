"""The vision tower in a `config.json`, read and written.

**Source:** transformers `models/gemma3/configuration_gemma3.py`, `models/siglip`.
"""

from collections.abc import Mapping
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._fields import Fields
from equigemma.checkpoint.hf._options import ACTIVATION, MAX_LAYERS
from equigemma.checkpoint.hf._without_effect import WITHOUT_EFFECT_IN_VISION
from equigemma.config import ModelConfig, SigLIPConfig


_KIND = "siglip_vision_model"
# What transformers takes where a key is left out.
_DEFAULTS = {
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}
# keras-hub writes these here too; transformers reads them around this table alone.
_AROUND = ("boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image")


def read_vision(around: Fields) -> SigLIPConfig | None:
    """The vision tower that a config around a text model names; None if it has none.

    **Raises:** `CheckpointError` for an option that is not supported.
    """
    # Both names of the same option, the older one in files.
    tokens = {
        name: _either(around, f"{short}_token_index", f"{short}_token_id", default)
        for name, short, default in (("start", "boi", 255_999), ("end", "eoi", 256_000))
    }
    soft_tokens = int(around.number("mm_tokens_per_image", 256))
    table = around.table("vision_config")
    if not table:
        return None
    read = Fields(table, _DEFAULTS, name="vision_config.")
    for key, value in zip(_AROUND, (*tokens.values(), None, soft_tokens), strict=True):
        if value is None:
            read.take(key)
        else:
            read.expect(key, value)
    read.expect("model_type", _KIND)
    read.expect("hidden_act", ACTIVATION)
    read.expect("num_channels", 3)
    read.expect("attention_dropout", 0.0)
    layers = read.size("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise CheckpointError(f"its vision_config has {layers} layers; no model has so many.")
    sizes = dict(
        pixels=read.size("image_size"),
        patch=read.size("patch_size"),
        width=read.size("hidden_size"),
        heads=read.size("num_attention_heads"),
        hidden=read.size("intermediate_size"),
    )
    epsilon = float(read.number("layer_norm_eps"))
    read.refuse_rest(WITHOUT_EFFECT_IN_VISION)
    try:
        return SigLIPConfig(
            **sizes, **tokens, layers=layers, epsilon=epsilon, num_soft_tokens=soft_tokens
        )
    except ValueError as error:
        raise CheckpointError(f"its vision_config describes no valid tower. {error}") from error


def write_vision(config: ModelConfig, text: Mapping[str, Any]) -> dict[str, Any]:
    """`text`, the description of the text model, with that of the vision tower around it.

    **Raises:** `CheckpointError` if the text model is not of a kind that has one.
    """
    vision = config.vision
    if vision is None or text["model_type"] != "gemma3_text":
        raise CheckpointError(f"a model of the kind {text['model_type']} has no vision tower.")
    inner = dict(text)
    inner.pop("architectures")
    return {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": inner,
        "vision_config": {
            "model_type": _KIND,
            "hidden_size": vision.width,
            "image_size": vision.pixels,
            "intermediate_size": vision.hidden,
            "layer_norm_eps": vision.epsilon,
            "num_attention_heads": vision.heads,
            "num_channels": 3,
            "num_hidden_layers": vision.layers,
            "patch_size": vision.patch,
            "hidden_act": ACTIVATION,
            "attention_dropout": 0.0,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": vision.num_soft_tokens,
        "boi_token_index": vision.start,
        "eoi_token_index": vision.end,
        # One past the ids of the text: none of them is ever mistaken for a soft token.
        "image_token_index": min(262_144, config.vocab),
        "initializer_range": 0.02,
        "tie_word_embeddings": config.lm_head == "tied",
    }


def _either(around: Fields, name: str, other: str, default: int) -> int:
    named = [value for key in (name, other) if (value := around.take(key)) is not None]
    if any(type(value) is not int or value != named[0] for value in named):
        raise CheckpointError(f"its {name} must be a whole number, got {named}.")
    return named[0] if named else default
