"""Models written against the protocols: a static checker must accept all of this. It is not run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

import equigemma as eg
from equigemma import linen


@dataclass(frozen=True)
class Info:
    tokenizer_version: int | str | None = 3
    default_ckpt: str | None = None


@dataclass(frozen=True)
class Inputs:
    support_images: bool = False
    num_tokens_per_image: int = 0
    special_tokens: Any = linen.SpecialTokens


@dataclass(frozen=True)
class Config:
    num_embed: int = 31
    input_config: Inputs = Inputs()

    def init_cache(
        self, *, batch_size: int, dtype: Any, cache_length: int, sharding: Any = None
    ) -> dict[str, dict[str, Array]]:
        return {"layer_0": {"k": jnp.zeros((batch_size, cache_length), dtype)}}


@dataclass(frozen=True)
class Bigram:
    """The smallest model that a sampler could drive: the next token follows from this one."""

    config: Config = Config()
    INFO = Info()

    def init(self, rngs: Any, *args: Any, **options: Any) -> dict[str, Any]:
        return {"params": {"table": jax.random.normal(rngs, (31, 31))}}

    def __call__(
        self,
        tokens: Int[Array, "*B L"],
        *,
        images: UInt8[Array, "..."] | None = None,
        positions: Int[Array, "*B L"] | None = None,
        cache: Mapping[str, Mapping[str, Array]] | None = None,
        attention_mask: Bool[Array, "*B L S"] | None = None,
        return_last_only: bool | None = None,
        return_hidden_states: bool | None = None,
    ) -> linen.ShimOutput:
        raise TypeError("use apply")

    def apply(
        self, variables: Mapping[str, Any], tokens: Int[Array, "*B L"], **options: Any
    ) -> linen.ShimOutput:
        logits: Float[Array, "*B L V"] = variables["params"]["table"][tokens]
        return linen.ShimOutput(logits, options.get("cache"), None)

    def init_cache(
        self, *, batch_size: int, dtype: Any, cache_length: int, sharding: Any = None
    ) -> dict[str, dict[str, Array]]:
        return self.config.init_cache(
            batch_size=batch_size, dtype=dtype, cache_length=cache_length, sharding=sharding
        )


def sample(model: linen.TransformerLike, params: Mapping[str, Any]) -> Array:
    """What a sampler does, in terms of the protocols alone."""
    cache = model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=model.config.num_embed)
    token = model.config.input_config.special_tokens.BOS
    version: int | str | None = model.INFO.tokenizer_version
    assert version is not None
    output = model.apply({"params": params}, jnp.array([[token]]), cache=cache)
    return output.logits


variables = linen.Gemma3_270M().init(jax.random.key(0), jnp.ones((1, 3), int))
sample(linen.Gemma3_270M(), variables["params"])
sample(linen.Transformer(config=eg.variants.get("gemma3-1b")), variables["params"])
sample(linen.Transformer(config=linen.Gemma2_2B().config), variables["params"])
sample(Bigram(), variables["params"])

like: linen.TransformerLike = linen.Gemma3_4B(dtype="float32", return_last_only=True)
config: linen.TransformerConfig = linen.Gemma3_4B().config
info: linen.ModelInfo = linen.Gemma3_4B.INFO
tokens = jnp.ones((2, 5), int)
output: linen.Output = linen.Gemma3_4B().apply(variables, tokens, return_last_only=True)
logits: Array = output.logits
cache = output.cache
if cache is not None:
    keys: Array = cache["layer_0"]["k"]
    linen.Gemma3_4B().apply(variables, tokens, cache=cache)
output, updated = linen.Gemma3_4B().apply(variables, tokens, mutable=["intermediates"])
embedded = linen.Gemma3_4B().apply(variables, tokens, method="embedder.encode")
bound: eg.Transformer = linen.Gemma3_4B().bind(variables)
again: eg.Transformer = linen.from_variables(bound.config, linen.to_variables(bound))


def texts(model: eg.Transformer, tokenizer: eg.tokenizers.Tokenizer) -> str:
    """What comes back follows from what goes in."""
    answers: list[str] = eg.generate(model, tokenizer, "hello", num_samples=2, seed=3)
    many: list[str] = eg.generate(model, tokenizer, ["hello", "you"], temperature=0.7)
    both: list[list[str]] = eg.generate(model, tokenizer, ["hello", "you"], num_samples=2)
    scores: list[eg.Score] = eg.score(model, tokenizer, [*answers, *many, *both[0]])
    layer: eg.nn.AbstractBlock = model.layers[5]
    weight: Array = model.layers[5].attention.output.weight
    one = eg.generate(model, tokenizer, "hello")
    return (
        f"{one} {scores[0].perplexity} {eg.score(model, tokenizer, one).logprob} {layer} {weight}"
    )
