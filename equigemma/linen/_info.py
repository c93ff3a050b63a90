"""Metadata of a model that samplers read: special tokens, inputs, tokenizer."""

import enum
from dataclasses import dataclass

from equigemma.config import SigLIPConfig


class SpecialTokens(enum.IntEnum):
    """Ids with a meaning of their own in the vocabulary of Gemma 3."""

    PAD = 0
    EOS = 1
    BOS = 2
    UNK = 3
    MASK = 4
    CUSTOM = 6
    """`<unused0>`; the next 98 ids are free for users too."""
    BEGIN_OF_TOOL_RESPONSE = 50
    START_OF_TURN = 105
    END_OF_TURN = 106
    START_OF_IMAGE = 255_999
    IMAGE_PLACEHOLDER = 255_999
    END_OF_IMAGE = 256_000


class AttentionType(enum.Enum):
    """The kinds of attention layers, under DeepMind's names."""

    GLOBAL = 1
    LOCAL_SLIDING = 2


@dataclass(frozen=True, kw_only=True)
class ShimInput:
    """The inputs of a model besides text."""

    support_images: bool = False
    num_tokens_per_image: int = 0
    already_expanded: bool = False
    """Whether prompts come with their image tokens in place."""
    special_tokens: type[enum.IntEnum] = SpecialTokens


@dataclass(frozen=True, kw_only=True)
class ShimInfo:
    """The tokenizer and the published weights that belong to a model."""

    tokenizer_version: int | str | None = None
    default_ckpt: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShimTower:
    """The dimensions of a SigLIP vision encoder, under DeepMind's names."""

    patch_size: tuple[int, int]
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    posemb: str = "learn"
    scan: bool = False


@dataclass(frozen=True, kw_only=True)
class ShimVision:
    """The dimensions of images and of their soft tokens, under DeepMind's names."""

    siglip_encoder: ShimTower
    num_mm_tokens_per_image_prepool: int
    num_mm_tokens_per_image: int
    image_height: int
    image_width: int
    image_channels: int = 3

    @classmethod
    def of(cls, vision: SigLIPConfig) -> "ShimVision":
        """The dimensions of `vision`."""
        return cls(
            siglip_encoder=ShimTower(
                patch_size=(vision.patch, vision.patch),
                width=vision.width,
                depth=vision.layers,
                mlp_dim=vision.hidden,
                num_heads=vision.heads,
            ),
            num_mm_tokens_per_image_prepool=vision.side**2,
            num_mm_tokens_per_image=vision.num_soft_tokens,
            image_height=vision.pixels,
            image_width=vision.pixels,
        )
