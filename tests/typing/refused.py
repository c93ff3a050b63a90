"""What a static checker must refuse: where it did not, ignoring the line would be unnecessary."""

# pyright: reportUnnecessaryTypeIgnoreComment=error

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

import equigemma as eg
from equigemma import linen


class NoCache:
    """Everything but `init_cache`."""

    config = linen.Gemma3_270M().config
    INFO = linen.ShimInfo()

    def init(self, rngs: Any, *args: Any, **options: Any) -> dict[str, Any]:
        return {}

    def __call__(self, tokens: Array, **options: Any) -> linen.ShimOutput:
        raise TypeError("use apply")

    def apply(self, variables: Any, tokens: Array, **options: Any) -> linen.ShimOutput:
        raise NotImplementedError


class OtherApply(NoCache):
    """An `apply` without room for a cache."""

    def init_cache(
        self, *, batch_size: int, dtype: Any, cache_length: int, sharding: Any = None
    ) -> dict[str, dict[str, Array]]:
        return {}

    def apply(self, variables: Any, tokens: Array) -> linen.ShimOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError


tokens = jnp.ones((2, 5), int)
equinox_model: eg.Transformer = linen.from_variables(eg.variants.get("gemma3-1b"), {})

no_cache: linen.TransformerLike = NoCache()  # pyright: ignore[reportAssignmentType]
other_apply: linen.TransformerLike = OtherApply()  # pyright: ignore[reportAssignmentType]
not_like: linen.TransformerLike = equinox_model  # pyright: ignore[reportAssignmentType]
not_config: linen.TransformerConfig = equinox_model.config  # pyright: ignore[reportAssignmentType]
no_info: linen.ModelInfo = equinox_model.config  # pyright: ignore[reportAssignmentType]
no_output: linen.Output = tokens  # pyright: ignore[reportAssignmentType]

linen.Transformer(config="gemma3-270m")  # pyright: ignore[reportArgumentType]
linen.Gemma3_270M("float32")  # pyright: ignore[reportCallIssue]
linen.Gemma3_270M().dtype = jnp.float32  # pyright: ignore[reportAttributeAccessIssue]
linen.Gemma3_270M().init_cache(batch_size=2, dtype=jnp.float32)  # pyright: ignore[reportCallIssue]
linen.Gemma3_270M().apply({}, tokens).tokens  # pyright: ignore[reportAttributeAccessIssue]
linen.to_variables(linen.Gemma3_270M())  # pyright: ignore[reportArgumentType]
