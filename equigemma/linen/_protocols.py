"""The protocol of a model that samplers written for DeepMind's models can drive.

The same contract as `gemma.gm.nn.TransformerLike`, stated without Flax. `isinstance` checks at run
time that all members are there; a static checker also checks their types. Nothing here computes.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from equigemma._typing import Array, Bool, Float, Int, Key, UInt8, UInt32
from equigemma.linen._collections import Filter


Cache = Mapping[str, Mapping[str, Array]]
"""For each `layer_i`: `k` and `v` `[*B S K H]`, `positions` `[*B S]`, `end_index` `[*B]`."""

Images = UInt8[Array, "*B I height width 3"] | UInt8[Array, "*B height width 3"]
"""Pictures: several for each row, or one."""

Rngs = Key[Array, ""] | UInt32[Array, "2"] | Mapping[str, Any]
"""A random key, typed or raw, or one for each collection."""


@runtime_checkable
class ModelInfo(Protocol):
    """Which tokenizer and which published weights belong to a class of models."""

    @property
    def tokenizer_version(self) -> int | str | None:
        """2, 3, "3n", ...; None: the sampler must be given a tokenizer."""
        ...

    @property
    def default_ckpt(self) -> str | None:
        """Where the weights are published."""
        ...


@runtime_checkable
class InputConfig(Protocol):
    """What a model can read."""

    @property
    def support_images(self) -> bool: ...

    @property
    def num_tokens_per_image(self) -> int: ...

    @property
    def special_tokens(self) -> Any:
        """Ids by name: `special_tokens.START_OF_IMAGE`."""
        ...


@runtime_checkable
class TransformerConfig(Protocol):
    """The part of a config that a sampler reads."""

    @property
    def input_config(self) -> InputConfig: ...

    @property
    def num_embed(self) -> int:
        """Size of the vocabulary."""
        ...

    def init_cache(
        self, *, batch_size: int, dtype: Any, cache_length: int, sharding: Any = None
    ) -> Cache: ...


@runtime_checkable
class Output(Protocol):
    """What a forward pass returns. `*B L` loses its `L` with `return_last_only`."""

    @property
    def logits(self) -> Float[Array, "*B V"]: ...

    @property
    def cache(self) -> Cache | None:
        """The cache after the pass; None if none was given."""
        ...

    @property
    def hidden_states(self) -> Float[Array, "*B D"] | None:
        """What the logits are made from; None unless asked for."""
        ...


@runtime_checkable
class TransformerLike(Protocol):
    """A model that a sampler can drive: configuration apart from variables.

    A sampler keeps it as a static argument of `jax.jit`: it must be hashable and equal by value.
    """

    @property
    def config(self) -> TransformerConfig: ...

    @property
    def INFO(self) -> ModelInfo: ...

    def init(
        self,
        rngs: Rngs,
        *args: Any,
        method: Callable[..., Any] | str | None = None,
        mutable: Filter = ...,
        capture_intermediates: bool | Callable[[Any, str], bool] = False,
        **kwargs: Any,
    ) -> dict[str, Any]: ...

    def __call__(
        self,
        tokens: Int[Array, "*B L"],
        *,
        images: Images | None = None,
        positions: Int[Array, "*B L"] | None = None,
        cache: Cache | None = None,
        attention_mask: Bool[Array, "*B L S"] | None = None,
        return_last_only: bool | None = None,
        return_hidden_states: bool | None = None,
    ) -> Output: ...

    def apply(
        self,
        variables: Mapping[str, Any],
        tokens: Int[Array, "*B L"],
        *,
        images: Images | None = None,
        cache: Cache | None = None,
        positions: Int[Array, "*B L"] | None = None,
        attention_mask: Bool[Array, "*B L S"] | None = None,
    ) -> Any: ...

    def init_cache(
        self,
        *,
        batch_size: int,
        dtype: Any,
        cache_length: int,
        sharding: Any = None,
    ) -> Cache: ...
