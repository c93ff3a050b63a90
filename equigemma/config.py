"""Model configs, as frozen data: one `LayerConfig` per layer.

A config holds numbers and choices, no arrays and no code: absence is `None`, alternatives are
types. It is hashable, so it can be static under `jit`. Invariants are checked on construction.
Presets live in `equigemma.variants`; the modules built from a config live in `equigemma.nn`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from math import isqrt
from typing import Literal, SupportsIndex

from wadler_lindig import AbstractDoc, TextDoc

from equigemma._arguments import as_integer, described
from equigemma._config_fields import check_fields, require_divisor, require_positive
from equigemma._encoder_config import ConformerConfig as ConformerConfig
from equigemma._encoder_config import MelConfig as MelConfig
from equigemma._encoder_config import PatchConfig as PatchConfig
from equigemma._encoder_config import RawAudioConfig as RawAudioConfig
from equigemma._encoder_config import VisionTransformerConfig as VisionTransformerConfig


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    epsilon: float = 1e-6
    """Added to the mean square."""
    offset: float | None = 1.0
    """Added to the learned scale, 1 in Gemma 1 to 3. None: the norm has no learned scale."""

    def __post_init__(self):
        check_fields(self)
        require_positive(self, "epsilon")


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
        check_fields(self)
        require_positive(self, "theta")
        if self.scale < 1.0:
            raise ValueError(f"RopeConfig.scale must be at least 1, got {self.scale}.")
        if not 0.0 < self.proportion <= 1.0:
            raise ValueError(f"RopeConfig.proportion must lie in (0, 1], got {self.proportion}.")


@dataclass(frozen=True, kw_only=True)
class OwnKVConfig:
    """The layer projects keys and values of its own."""

    heads: int  # K

    def __post_init__(self):
        check_fields(self)
        require_positive(self, "heads")


@dataclass(frozen=True, kw_only=True)
class KeyIsValueConfig:
    """One projection gives both; what makes them differ is their norms and the keys' rotation."""

    heads: int  # K

    def __post_init__(self):
        check_fields(self)
        require_positive(self, "heads")


@dataclass(frozen=True, kw_only=True)
class SharedKVConfig:
    """The layer attends to the keys and values of an earlier one, and has no cache itself."""

    layer: int
    """Index of the layer that owns them: same window, head size and rotation."""
    unused: OwnKVConfig | KeyIsValueConfig | None = None
    """Projections that a checkpoint stores here all the same; carried along, never read."""

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One attention layer: grouped-query attention, full or with a sliding window."""

    heads: int  # N
    head_dim: int  # H
    kv: OwnKVConfig | KeyIsValueConfig | SharedKVConfig
    rope: RopeConfig
    query_scale: float
    """What a query is multiplied by: the number, not a rule for it."""
    window: int | None = None
    """Sliding window: keys a query attends to, itself included. None: global attention."""
    softcap: float | None = None
    """Logits become c·tanh(logits / c)."""
    qk_norm: NormConfig | None = None
    v_norm: NormConfig | None = None
    mask_kind: Literal["causal", "causal_bidirectional_images", "bidirectional"] = "causal"
    """Which keys a query attends to: those at or before it, also those of its own image, or all."""
    qkv_axes: Literal["NDH,CKDH", "CNDH"] = "NDH,CKDH"
    """How the projections are stored: queries apart, or all as one (then K = N)."""

    def __post_init__(self):
        check_fields(self)
        require_positive(self, "heads", "head_dim", "query_scale", "window", "softcap")
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even, because RoPE rotates pairs; got {self.head_dim}."
            )
        if not isinstance(self.kv, SharedKVConfig):
            require_divisor(self.kv.heads, self.heads)
        if self.qkv_axes == "CNDH" and self.kv != OwnKVConfig(heads=self.heads):
            raise ValueError(
                f"qkv_axes='CNDH' stores as many key/value heads as query heads; got {self.kv} "
                f"and {self.heads} query heads. Use 'NDH,CKDH'."
            )


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """Feed-forward with a tanh-approximated GELU gate (Shazeer 2020, arXiv:2002.05202)."""

    hidden_dim: int  # F
    """Hidden units: `intermediate_size` in `transformers`."""
    gate_axes: Literal["CFD", "CDF"] = "CFD"
    """How gate and up projection are stored. Checkpoints of Gemma 1 and Gemma 2 2B use 'CDF'."""
    cutoff: float | None = None
    """Gaussian top-k sparsity: gates count by how far they lie above mean + cutoff · standard
    deviation, the rest is 0. None: all count.
    """

    def __post_init__(self):
        check_fields(self)
        require_positive(self, "hidden_dim")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): each token passes a few."""

    num_experts: int  # E
    num_experts_per_token: int  # X
    """The router's top k."""
    hidden_dim: int  # F, of each expert

    def __post_init__(self):
        check_fields(self)
        require_positive(self, "num_experts", "num_experts_per_token", "hidden_dim")
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                "MoEConfig.num_experts_per_token must be at most num_experts; got "
                f"{self.num_experts_per_token} of {self.num_experts}."
            )


@dataclass(frozen=True, kw_only=True)
class DensePlusMoEConfig:
    """A feed-forward that all tokens pass, and beside it one of experts."""

    dense: FeedForwardConfig
    moe: MoEConfig

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer. Post-norms, where present, normalise what a sub-layer adds to the stream."""

    attention: AttentionConfig
    ffw: FeedForwardConfig | DensePlusMoEConfig
    pre_norm: NormConfig = NormConfig()
    post_norm: NormConfig | None = None
    skip_scale: Literal["learned"] | None = None
    """Whether the stream is multiplied by a learned number after the layer."""

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class PlainStreamConfig:
    """One residual stream `[*B L D]`, which every layer adds to."""


@dataclass(frozen=True, kw_only=True)
class AltUpConfig:
    """Parallel streams `[A *B L D]` of which layers compute one (arXiv:2301.13310).

    Its layers also have a low-rank path beside attention, LAuReL (arXiv:2411.07501).
    """

    streams: int  # A
    laurel_rank: int  # Q
    modes: int = 4  # U
    clip: float | None = None
    """Bound on the size of the learned mixing coefficients."""

    def __post_init__(self):
        check_fields(self)
        require_positive(self, "streams", "laurel_rank", "modes", "clip")


@dataclass(frozen=True, kw_only=True)
class PerLayerConfig:
    """A second embedding, which gives every token a vector for each layer."""

    vocab: int
    """Rows of its table; other tokens count as token 0."""
    dim: int  # P
    norm: NormConfig = NormConfig(offset=0.0)

    def __post_init__(self):
        check_fields(self)
        require_positive(self, "vocab", "dim")


@dataclass(frozen=True, kw_only=True)
class SigLIPConfig:
    """The SigLIP vision encoder, a ViT (arXiv:2010.11929, trained as in arXiv:2303.15343).

    Neighbouring patches are averaged to `num_soft_tokens` vectors, which stand in the text between
    `start` and `end`, with a `newline` before and after. The defaults are those of Gemma 3.
    """

    pixels: int = 896
    """Of each side: an image becomes a square."""
    patch: int = 14
    """Pixels of each side of a patch."""
    width: int = 1152  # T
    layers: int = 27
    heads: int = 16  # N
    hidden: int = 4304  # F
    epsilon: float = 1e-6
    """Added to variances."""
    num_soft_tokens: int = 256  # M
    start: int = 255_999
    """The id that stands for an image in a text, and for its beginning among soft tokens."""
    end: int = 256_000
    newline: int = 108
    """Two line ends."""

    def __post_init__(self):
        check_fields(self)
        require_positive(self, "pixels", "patch", "width", "layers", "heads", "hidden")
        require_positive(self, "epsilon", "num_soft_tokens")
        if self.width % self.heads:
            raise ValueError(
                f"SigLIPConfig.heads must divide its width; got {self.heads} and {self.width}."
            )
        side = isqrt(self.num_soft_tokens)
        if self.pixels % self.patch or side**2 != self.num_soft_tokens or self.side % side:
            raise ValueError(
                "SigLIPConfig.patch must divide pixels, and num_soft_tokens must be the square of "
                f"a divisor of pixels / patch; got {self.patch}, {self.pixels} and "
                f"{self.num_soft_tokens}. Gemma 3 has 14, 896 and 256, from 64 patches a side."
            )

    @property
    def side(self) -> int:
        """Patches of each side."""
        return self.pixels // self.patch


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model. `layers` has one entry per layer: the config *is* the list of layers."""

    vocab: int  # V
    width: int  # D
    layers: tuple[LayerConfig, ...]
    final_norm: NormConfig = NormConfig()
    final_softcap: float | None = None
    lm_head: Literal["tied", "untied"] = "tied"
    """Whether the embedding table gives the logits too, or a matrix of their own does."""
    stream: PlainStreamConfig | AltUpConfig = PlainStreamConfig()
    per_layer: PerLayerConfig | None = None
    vision: SigLIPConfig | None = None

    def __post_init__(self):
        check_fields(self)
        require_positive(self, "vocab", "width", "final_softcap")
        if not isinstance(self.layers, tuple | list) or not all(
            isinstance(layer, LayerConfig) for layer in self.layers
        ):
            raise TypeError(
                "`ModelConfig.layers` must be a tuple of LayerConfig, got "
                f"{described(self.layers)}."
            )
        # A config is hashable, which a list is not.
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("ModelConfig.layers must hold at least one layer, got none.")
        for index, layer in enumerate(self.layers):
            if isinstance(layer.attention.kv, SharedKVConfig):
                self._check_owner(index, layer.attention.kv.layer)
            if layer.skip_scale is not None and not isinstance(self.stream, PlainStreamConfig):
                raise ValueError(
                    f"Layer {index} has a skip_scale, which goes with one residual stream only; "
                    f"got stream={self.stream}."
                )

    def text_only(self) -> "ModelConfig":
        """The same model without its vision tower, and so without images in the text."""
        if self.vision is None:
            return self
        layers = tuple(
            replace(layer, attention=replace(layer.attention, mask_kind="causal"))
            for layer in self.layers
        )
        return replace(self, layers=layers, vision=None)

    def with_vision(self, tower: SigLIPConfig) -> "ModelConfig":
        """The same model with a vision tower: soft tokens of one image attend to each other.

        **Arguments:** `tower`: the config of the tower. A tower that is there is replaced.
        """
        layers = tuple(
            replace(
                layer, attention=replace(layer.attention, mask_kind="causal_bidirectional_images")
            )
            for layer in self.layers
        )
        return replace(self, layers=layers, vision=tower)

    def with_layers(self, layers: Iterable[SupportsIndex]) -> "ModelConfig":
        """The same model of chosen layers: their indices in the new order, negative ones from the
        end. One may be left out, or there several times.

        A layer that attends to the keys of another attends to those of its nearest copy before it.

        **Raises:** `ValueError` for an index that is none, no layer, or one whose keys are those of
        a layer that does not come before it.
        """
        count = len(self.layers)
        chosen = [as_integer(f"layers[{at}]", index) for at, index in enumerate(layers)]
        if outside := [index for index in chosen if not -count <= index < count]:
            raise ValueError(
                f"`layers` holds {outside[0]}, and the model has the layers 0 to {count - 1}."
            )
        chosen = [index % count for index in chosen]
        return replace(self, layers=tuple(self._moved(chosen, at) for at in range(len(chosen))))

    def _moved(self, chosen: Sequence[int], at: int) -> LayerConfig:
        """The layer that comes to be at `at`."""
        layer, owner = self.layers[chosen[at]], self.owner(chosen[at])
        kv = layer.attention.kv
        if not isinstance(kv, SharedKVConfig):
            return layer
        copies = [place for place in range(at) if chosen[place] == owner]
        if not copies:
            raise ValueError(
                f"Layer {chosen[at]} shares the keys and values of layer {owner}, which must come "
                f"before it; got layers={list(chosen)}."
            )
        kv = replace(kv, layer=copies[-1])
        return replace(layer, attention=replace(layer.attention, kv=kv))

    def owner(self, index: int) -> int:
        """The layer whose keys and values layer `index` attends to: itself unless it shares."""
        kv = self.layers[index].attention.kv
        return kv.layer if isinstance(kv, SharedKVConfig) else index

    def kv_heads(self, index: int) -> int:
        """Number of key/value heads that layer `index` attends to, its own or shared ones."""
        kv = self.layers[self.owner(index)].attention.kv
        assert not isinstance(kv, SharedKVConfig)  # checked on construction
        return kv.heads

    def _check_owner(self, index: int, owner: int) -> None:
        if not 0 <= owner < index:
            raise ValueError(
                f"Layer {index} shares the keys and values of layer {owner}; the owner must be one "
                f"of the layers before it."
            )
        ours, theirs = self.layers[index].attention, self.layers[owner].attention
        if isinstance(theirs.kv, SharedKVConfig):
            raise ValueError(
                f"Layer {index} shares the keys and values of layer {owner}, which has none of its "
                f"own: name their owner, layer {theirs.kv.layer}."
            )
        for name in ("window", "head_dim", "rope"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(
                    f"Layer {index} shares the keys and values of layer {owner}, so both need the "
                    f"same {name}; got {getattr(ours, name)} and {getattr(theirs, name)}."
                )
        require_divisor(theirs.kv.heads, ours.heads)

    def __pdoc__(self, **options: object) -> AbstractDoc:
        return TextDoc(repr(self))

    def __repr__(self) -> str:
        # One line per model: the full list of layers is what `equigemma.describe` prints.
        shown = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "layers"
        )
        return f"ModelConfig({shown}, layers=<{len(self.layers)} layers>)"
