"""Checks of the arguments of the shim's constructor and of `capture_intermediates`."""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any

from equigemma.checkpoint.gemma import config_from_upstream
from equigemma.config import ModelConfig
from equigemma.linen._config import ShimConfig
from equigemma.linen._sites import Site, Wanted


Capture = bool | Callable[[Site, str], bool]
"""All calls or none, or a function of a site and the name of one of its methods."""


def config_of(name: str, config: Any, text_only: bool | None) -> ShimConfig:
    """The config of a model called `name`, without the vision tower if `text_only`.

    **Raises:** `TypeError` or `ValueError`.
    """
    if isinstance(config, ModelConfig):
        config = ShimConfig(config)
    elif isinstance(config, Mapping) or (is_dataclass(config) and hasattr(config, "num_embed")):
        if not isinstance(config, ShimConfig):
            config = ShimConfig(config_from_upstream(config, text_only=bool(text_only)))
    if not isinstance(config, ShimConfig):
        raise TypeError(
            f'{name}(config=...) needs a ModelConfig, like equigemma.variants.get("gemma3-270m"), '
            f"or a TransformerConfig of DeepMind's package, got {type(config).__name__}."
        )
    if text_only is False and config.model.vision is None:
        raise ValueError(
            f"{name}(text_only=False) asks for encoders of images and audio, which equigemma.linen "
            "does not have for this model. Leave text_only out to read and write text."
        )
    return replace(config, model=config.model.text_only()) if text_only else config


def wanted_by(capture: Capture) -> Wanted | None:
    """The filter that `capture` stands for; None if nothing is to be captured.

    **Raises:** `TypeError`.
    """
    if isinstance(capture, bool):
        return _calls if capture else None
    if callable(capture):
        return capture
    raise TypeError(
        "`capture_intermediates` must be a bool or a function (site, method name) -> bool; got "
        f"{type(capture).__name__}."
    )


def _calls(site: Site, method: str) -> bool:
    del site
    return method == "__call__"
