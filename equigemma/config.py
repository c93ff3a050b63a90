"""What a Gemma is made of, as frozen data: one `LayerConfig` per layer.

A config holds numbers and choices, no arrays and no code: absence is `None`, alternatives are
types. It is hashable, so it can be static under `jit`. Invariants are checked on construction.
Presets live in `equigemma.variants`; the modules built from a config live in `equigemma.nn`.
"""

from dataclasses import dataclass, fields
from typing import Literal


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(
                f"{type(config).__name__}.{name} must be positive, got {value}."
            )


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    epsilon: float = 1e-6
    """Added to the mean square."""
    offset: float | None = 1.0
    """Added to the learned scale, 1 in Gemma 1 to 3. None: the norm has no learned scale."""

    def __post_init__(self):
        _require_positive(self, "epsilon")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

    theta: float = 10_000.0
    """Base of the wavelengths."""
    scale: float = 1.0
    """Positions are divided by this: linear interpolation to longer contexts."""
    proportion: float = 1.0
    """Share of the head that is rotated, in (0, 1]."""

    def __post_init__(self):
        _require_positive(self, "theta")
        if self.scale < 1.0:
            raise ValueError(f"RopeConfig.scale must be at least 1, got {self.scale}.")
        if not 0.0 < self.proportion <= 1.0:
            raise ValueError(f"RopeConfig.proportion must lie in (0, 1], got {self.proportion}.")


@dataclass(frozen=True, kw_only=True)
class OwnKV:
    """The layer projects keys and values of its own."""

    heads: int  # K

    def __post_init__(self):
        _require_positive(self, "heads")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One attention layer: grouped-query attention, full or with a sliding window."""

    heads: int  # N
    head_dim: int  # H
    kv: OwnKV
    rope: RopeConfig
    query_scale: float
    """What a query is multiplied by: the number, not a rule for it."""
    window: int | None = None
    """Keys a query sees, itself included. None: all before it."""
    softcap: float | None = None
    """Logits become c·tanh(logits / c)."""
    qk_norm: NormConfig | None = None
    qkv_axes: Literal["NDH,CKDH", "CNDH"] = "NDH,CKDH"
    """How the projections are stored: queries apart, or all as one (then K = N)."""

    def __post_init__(self):
        _require_positive(self, "heads", "head_dim", "query_scale", "window", "softcap")
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even, because rotary embedding turns pairs; got {self.head_dim}."
            )
        if self.heads % self.kv.heads:
            raise ValueError(
                f"The number of key/value heads must divide the number of query heads; got "
                f"{self.kv.heads} and {self.heads}. Gemma 3 4B uses 4 and 8."
            )
        if self.qkv_axes == "CNDH" and self.kv.heads != self.heads:
            raise ValueError(
                f"qkv_axes='CNDH' stores as many key/value heads as query heads; got "
                f"{self.kv.heads} and {self.heads}. Use 'NDH,CKDH'."
            )


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Feed-forward with a tanh-approximated GELU gate (Shazeer 2020, arXiv:2002.05202)."""

    hidden: int  # F
    gate_axes: Literal["CFD", "CDF"] = "CFD"
    """How gate and up projection are stored. Checkpoints of Gemma 1 and Gemma 2 2B use 'CDF'."""

    def __post_init__(self):
        _require_positive(self, "hidden")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer. Post-norms, where present, normalise what a sub-layer adds to the stream."""

    attention: AttentionConfig
    ffw: Dense
    pre_norm: NormConfig = NormConfig()
    post_norm: NormConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model. `layers` has one entry per layer: the config *is* the list of layers."""

    vocab: int  # V
    width: int  # D
    layers: tuple[LayerConfig, ...]
    final_norm: NormConfig = NormConfig()
    final_softcap: float | None = None

    def __post_init__(self):
        _require_positive(self, "vocab", "width", "final_softcap")
        if not self.layers:
            raise ValueError("ModelConfig.layers must hold at least one layer, got none.")

    def __repr__(self) -> str:
        # One line per model: the full list of layers is what `equigemma.describe` prints.
        shown = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "layers"
        )
        return f"ModelConfig({shown}, layers=<{len(self.layers)} layers>)"
