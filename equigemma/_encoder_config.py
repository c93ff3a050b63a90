"""Configs of the vision and audio encoders: what turns images and sound into soft tokens.

Frozen, hashable and checked on construction, like the configs of the decoder in `config.py`, which
re-exports all of these. Where the published implementations differ, the default is the number of
`transformers`, and the field says what DeepMind's package does.
"""

from dataclasses import dataclass
from typing import Literal


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            raise ValueError(f"{type(config).__name__}.{name} must be positive, got {value}.")


def _check_budgets(config: "VisionTransformerConfig | PatchConfig") -> None:
    name = type(config).__name__
    for field in ("max_soft_tokens", "video_soft_tokens"):
        if getattr(config, field) not in config.budgets:
            raise ValueError(
                f"{name}.{field} must be one of the token budgets {config.budgets}, got "
                f"{getattr(config, field)}."
            )
    longest = max(config.budgets) * config.side // config.patch
    if config.positions < longest:
        raise ValueError(
            f"{name}.positions must cover the longest side of an image, {longest} patches with a "
            f"budget of {max(config.budgets)} soft tokens; got {config.positions}."
        )


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig:
    """The vision encoder of Gemma 4: a ViT (arXiv:2010.11929) for images of any aspect ratio.

    An image is resized so that its patches fill a token budget, each patch has a learned embedding
    of its column and one of its row (arXiv:2307.06304), and attention rotates one half of each head
    by the column and the other half by the row. `pooling`² patches become one soft token. The
    defaults are those of Gemma 4 E2B and E4B.
    """

    width: int = 768  # T
    """`hidden_size` of transformers."""
    layers: int = 16
    heads: int = 12  # N
    head_dim: int = 64  # H
    hidden: int = 3072  # F
    """`intermediate_size` of transformers."""
    patch: int = 16
    """Pixels of each side of a patch."""
    pooling: int = 3
    """Patches of each side that are averaged to one soft token, `pooling_kernel_size`."""
    positions: int = 10_240
    """Rows of the position table, one table for columns and one for rows."""
    rope_theta: float = 100.0
    epsilon: float = 1e-6
    """Added to mean squares."""
    clipping: Literal["stored"] | None = "stored"
    """Whether inputs and outputs of linear layers are clipped to bounds that checkpoints store."""
    standardize: Literal["stored"] | None = None
    """Whether pooled vectors are standardised by a bias and a scale that checkpoints store."""
    padding_keys: Literal["masked", "attended"] = "masked"
    """Whether patches that only pad an image to its budget are left out of attention. DeepMind's
    package adds its mask to the logits, so that they take part, by 1 below the others."""
    max_soft_tokens: int = 280
    """Token budget of an image. DeepMind's sampler takes 1120."""
    budgets: tuple[int, ...] = (70, 140, 280, 560, 1120)
    """The token budgets that the model was trained with."""
    video_soft_tokens: int = 70
    """Token budget of a frame of a video."""
    video_frames: int = 32
    """Frames that a video is sampled to."""
    start: int = 255_999
    """The id before the soft tokens of an image, `boi_token_id`."""
    image: int = 258_880
    """The id that stands for an image in a prompt, and for each of its soft tokens."""
    end: int = 258_882
    """The id after the soft tokens of an image, `eoi_token_id`."""
    video: int = 258_884
    """The id that stands for a video in a prompt."""

    def __post_init__(self):
        sizes = ("width", "layers", "heads", "head_dim", "hidden", "patch", "pooling", "positions")
        _require_positive(self, *sizes, "rope_theta", "epsilon", "video_frames")
        if self.head_dim % 4:
            raise ValueError(
                "VisionTransformerConfig.head_dim must be divisible by 4, because each half of a "
                f"head is rotated in pairs; got {self.head_dim}."
            )
        _check_budgets(self)

    @property
    def side(self) -> int:
        """Pixels of each side of what becomes one soft token."""
        return self.patch * self.pooling


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """The vision embedder of Gemma 4 12B Unified, which has no encoder: a patch is a soft token.

    Raw pixel values are normalised and projected, and get learned embeddings of their column and
    row. The defaults are those of the 12B.
    """

    width: int = 3840  # T
    """`mm_embed_dim` of transformers."""
    patch: int = 48
    """Pixels of each side of a patch, `model_patch_size`."""
    positions: int = 1120
    """Rows of the position table, `mm_posemb_size`."""
    epsilon: float = 1e-6
    """Added to the mean square before the projection to the width of the text."""
    layer_norm_epsilon: float = 1e-5
    """Added to variances."""
    max_soft_tokens: int = 280
    """Token budget of an image."""
    budgets: tuple[int, ...] = (70, 140, 280, 560, 1120)
    """The token budgets that the model was trained with."""
    video_soft_tokens: int = 70
    """Token budget of a frame of a video."""
    video_frames: int = 32
    """Frames that a video is sampled to."""
    start: int = 255_999
    """The id before the soft tokens of an image, `boi_token_id`."""
    image: int = 258_880
    """The id that stands for an image in a prompt, and for each of its soft tokens."""
    end: int = 258_882
    """The id after the soft tokens of an image, `eoi_token_id`."""
    video: int = 258_884
    """The id that stands for a video in a prompt."""

    def __post_init__(self):
        _require_positive(self, "width", "patch", "positions", "epsilon", "layer_norm_epsilon")
        _require_positive(self, "video_frames")
        _check_budgets(self)

    @property
    def side(self) -> int:
        """Pixels of each side of what becomes one soft token."""
        return self.patch

    @property
    def pooling(self) -> int:
        """Patches of each side that become one soft token."""
        return 1


@dataclass(frozen=True, kw_only=True)
class MelConfig:
    """Log-mel spectrogram: the input of an audio encoder. The defaults are those of Gemma 4."""

    sample_rate: int = 16_000
    """Samples per second."""
    frame: int = 320
    """Samples of an analysis window."""
    hop: int = 160
    """Samples between the starts of two windows."""
    fft: int = 512
    """Length of the Fourier transform; windows are padded with zeros on the right."""
    mels: int = 128
    """Triangular filters from 0 Hz to half of the sample rate, evenly spaced in HTK mels."""
    floor: float = 1e-3
    """Added to magnitudes before the logarithm."""
    padding: int = 160
    """Zeros before the first sample. DeepMind's package has none."""
    window_offset: float = 0.0
    """Samples by which the Hann window is shifted: 0 is the periodic one, with a zero at its start.
    DeepMind's package takes 0.5."""
    validity: Literal["complete", "proportional"] = "complete"
    """Which frames are real: those whose last sample is, or as large a share of all frames as real
    samples are of all samples, as in DeepMind's package."""

    def __post_init__(self):
        _require_positive(self, "sample_rate", "frame", "hop", "fft", "mels", "floor")
        if self.fft < self.frame:
            raise ValueError(
                f"MelConfig.fft must be at least as long as a frame, got {self.fft} for "
                f"{self.frame} samples."
            )
        if self.padding < 0:
            raise ValueError(f"MelConfig.padding must not be negative, got {self.padding}.")


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """The audio encoder of Gemma 4: a conformer (arXiv:2005.08100) with chunked local attention.

    Two strided convolutions make one vector of four frames of a log-mel spectrogram. In chunked
    attention a query attends to keys of its own chunk and before it, with relative positions as in
    Transformer-XL (arXiv:1901.02860). The defaults are those of Gemma 4 E2B and E4B.
    """

    mel: MelConfig = MelConfig()
    width: int = 1024  # T
    """`hidden_size` of transformers."""
    layers: int = 12
    heads: int = 8  # N
    channels: tuple[int, int] = (128, 32)
    """Output channels of the two convolutions, `subsampling_conv_channels`."""
    kernel: int = 5
    """Taps of the depthwise convolution, `conv_kernel_size`."""
    residual_scale: float = 0.5
    """What a feed-forward adds to the residual stream is multiplied by this."""
    chunk: int = 12
    """Queries of a chunk of attention."""
    context: int = 13
    """Keys up to and including a query's own that have a relative position,
    `attention_context_left`."""
    window: int = 12
    """Keys that a query attends to, its own included. DeepMind's package takes all 13."""
    softcap: float = 50.0
    """Logits become c·tanh(logits / c)."""
    mask_value: float = -1e9
    """Logit of a key that is not attended to."""
    epsilon: float = 1e-6
    """Added to mean squares and variances."""
    clipping: Literal["stored"] | None = "stored"
    """Whether inputs and outputs of linear layers are clipped to bounds that checkpoints store."""
    max_activation: float = 1e10
    """Activations are clipped to this, `gradient_clipping`."""
    subsampling_mask: Literal["every", "first"] = "every"
    """Before which convolutions padding is set to zero. DeepMind's package: the first alone."""
    output_width: int = 1536
    """Width of the encoder's output, before the projection to the width of the text."""
    projection_norm: Literal["before", "after"] = "before"
    """Where the norm is, before or after the projection to the width of the text. DeepMind's
    package has it after."""
    max_samples: int = 480_000
    """The longest clip: 30 seconds."""
    start: int = 256_000
    """The id before the soft tokens of a clip, `boa_token_id`."""
    audio: int = 258_881
    """The id that stands for a clip in a prompt, and for each of its soft tokens."""
    end: int = 258_883
    """The id after the soft tokens of a clip, `eoa_token_index`."""

    def __post_init__(self):
        sizes = ("width", "layers", "heads", "kernel", "chunk", "context", "window")
        _require_positive(self, *sizes, "softcap", "epsilon", "max_activation", "output_width")
        _require_positive(self, "max_samples", "residual_scale")
        if min(self.channels) <= 0:
            raise ValueError(f"ConformerConfig.channels must be positive, got {self.channels}.")
        if self.width % self.heads:
            raise ValueError(
                f"ConformerConfig.heads must divide its width; got {self.heads} and {self.width}."
            )
        if self.width % 2:
            raise ValueError(
                "ConformerConfig.width must be even, because relative positions are sines and "
                f"cosines; got {self.width}."
            )
        if self.window > self.context:
            raise ValueError(
                "ConformerConfig.window must be at most its context, beyond which keys have no "
                f"relative position; got {self.window} and {self.context}."
            )

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Hidden size of the feed-forwards."""
        return 4 * self.width

    @property
    def sample_rate(self) -> int:
        """Samples per second."""
        return self.mel.sample_rate


@dataclass(frozen=True, kw_only=True)
class RawAudioConfig:
    """The audio embedder of Gemma 4 12B Unified, which has no encoder: a frame is a soft token.

    Raw samples are normalised and projected. The defaults are those of the 12B.
    """

    frame: int = 640
    """Samples of one soft token, `audio_embed_dim`."""
    sample_rate: int = 16_000
    """Samples per second."""
    epsilon: float = 1e-6
    """Added to mean squares."""
    max_samples: int = 480_000
    """The longest clip: 30 seconds."""
    start: int = 256_000
    """The id before the soft tokens of a clip, `boa_token_id`."""
    audio: int = 258_881
    """The id that stands for a clip in a prompt, and for each of its soft tokens."""
    end: int = 258_883
    """The id after the soft tokens of a clip, `eoa_token_index`."""

    def __post_init__(self):
        _require_positive(self, "frame", "sample_rate", "epsilon", "max_samples")
