"""DeepMind's vision encoder of Gemma 3 as a part of our config."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from equigemma.config import ModelConfig, SigLIPConfig


def with_vision(model: ModelConfig, encoder: Any) -> ModelConfig:
    """`model` with the tower that `encoder` is, a `SigLiPFromPatches` or a mapping of its fields.

    **Raises:** `ValueError` if there is none, or one of another kind.
    """
    if encoder is None:
        return model
    sizes = _fields(encoder, "num_mm_tokens_per_image", "image_height", "image_width")
    tower = _fields(
        _fields(encoder, "siglip_encoder")["siglip_encoder"],
        "patch_size",
        "width",
        "depth",
        "mlp_dim",
        "num_heads",
        "posemb",
        "scan",
    )
    height, width = sizes["image_height"], sizes["image_width"]
    rows, columns = tower["patch_size"]
    if height != width or rows != columns or tower["posemb"] != "learn" or tower["scan"]:
        raise ValueError(
            "Only square images of square patches with learned positions, one parameter for each "
            f"layer, are supported, as in the published models; got {height} x {width}, {rows} x "
            f"{columns}, posemb={tower['posemb']!r}, scan={tower['scan']}."
        )
    vision = SigLIPConfig(
        pixels=height,
        patch=rows,
        width=tower["width"],
        layers=tower["depth"],
        heads=tower["num_heads"],
        hidden=tower["mlp_dim"] or 4 * tower["width"],
        num_soft_tokens=sizes["num_mm_tokens_per_image"],
    )
    return seeing(model, vision)


def seeing(model: ModelConfig, vision: SigLIPConfig) -> ModelConfig:
    """`model` with a vision tower, and with attention among the tokens of an image."""
    layers = (
        replace(layer, attention=replace(layer.attention, mask_kind="causal_bidirectional_images"))
        for layer in model.layers
    )
    return replace(model, layers=tuple(layers), vision=vision)


def _fields(owner: Any, *names: str) -> dict[str, Any]:
    found = owner if isinstance(owner, Mapping) else {n: getattr(owner, n, None) for n in names}
    if missing := [name for name in names if found.get(name) is None and name != "mlp_dim"]:
        raise ValueError(
            f"This vision encoder is not of the kind of Gemma 3: it has no {', '.join(missing)}. "
            "With text_only=True it is left out."
        )
    return {name: found.get(name) for name in names}
