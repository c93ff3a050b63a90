"""What the shim tells a sampler about a model: inputs, vocabulary, cache, tokenizer."""

import enum
from dataclasses import dataclass

import jax.numpy as jnp

from equigemma.config import ModelConfig
from equigemma.linen._cache import CacheDict, init_cache


class SpecialTokens(enum.IntEnum):
    """Ids with a meaning of their own in the vocabulary of Gemma 3."""

    PAD = 0
    EOS = 1
    BOS = 2
    UNK = 3
    MASK = 4
    CUSTOM = 6
    """`<unused0>`; the next 98 ids are free for users too."""
    START_OF_TURN = 105
    END_OF_TURN = 106
    START_OF_IMAGE = 255_999
    IMAGE_PLACEHOLDER = 255_999
    END_OF_IMAGE = 256_000


@dataclass(frozen=True, kw_only=True)
class ShimInput:
    """What a model can read besides text."""

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


@dataclass(frozen=True)
class ShimConfig:
    """A `ModelConfig` with the names that a sampler looks for."""

    model: ModelConfig

    @property
    def num_embed(self) -> int:
        """Size of the vocabulary."""
        return self.model.vocab

    @property
    def input_config(self) -> ShimInput:
        """Text, and images where there is a vision tower."""
        vision = self.model.vision
        if vision is None:
            return ShimInput()
        return ShimInput(support_images=True, num_tokens_per_image=vision.soft_tokens)

    def init_cache(
        self,
        *,
        batch_size: int,
        dtype: object = jnp.bfloat16,
        cache_length: int,
        sharding: object = None,
    ) -> CacheDict:
        """An empty cache, see `Transformer.init_cache`."""
        return init_cache(
            self.model,
            batch_size=batch_size,
            dtype=dtype,
            cache_length=cache_length,
            sharding=sharding,
        )
