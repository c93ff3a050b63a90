"""The shim together with variables: what a method given to `apply` gets as its first argument."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from equigemma import nn
from equigemma._typing import Array, Bool, Float, Int
from equigemma.checkpoint.gemma import from_params
from equigemma.linen._cache import CacheDict
from equigemma.linen._config import ShimConfig
from equigemma.linen._forward import Options, ShimOutput, call
from equigemma.linen._inputs import refuse_media, require_arrays
from equigemma.linen._protocols import Cache, Images, ModelInfo
from equigemma.linen._sites import Intermediates, Site, Wanted, sow


if TYPE_CHECKING:
    from equigemma.linen._transformer import Transformer


class Bound:
    """A model with its parameters, under the names that DeepMind's bound model has."""

    def __init__(self, shim: "Transformer", params: Mapping[str, Any], wanted: Wanted | None):
        self._shim = shim
        self._params = params
        self._wanted = wanted
        self.intermediates: Intermediates = {}
        """What was captured so far."""

    @property
    def config(self) -> ShimConfig:
        """The shim's config."""
        return self._shim.config

    @property
    def INFO(self) -> ModelInfo:
        """The shim's tokenizer and weights."""
        return self._shim.INFO

    @property
    def model(self) -> nn.Transformer:
        """The Equinox model around the same arrays."""
        return from_params(self.config.model, self._params)

    @property
    def embedder(self) -> "Embedder":
        """The embedding table, both ways."""
        return Embedder(self.model.embedding, self._shim.logits_dtype, self._note)

    def init_cache(self, **sizes: Any) -> CacheDict:
        """An empty cache."""
        return self._shim.init_cache(**sizes)

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
        audio: None = None,
        audio_lengths: None = None,
        audio_soft_token_counts: tuple[int, ...] | None = None,
    ) -> ShimOutput:
        """A forward pass, see `Transformer.apply`."""
        refuse_media(images, audio)
        del audio_lengths, audio_soft_token_counts
        if return_last_only is not None and self._shim.return_last_only is not None:
            raise ValueError(
                "`return_last_only` was given twice, to the model "
                f"({self._shim.return_last_only}) and to this call ({return_last_only}). "
                "Give it in one place."
            )
        require_arrays(
            tokens=tokens, images=images, positions=positions, attention_mask=attention_mask
        )
        options = Options(
            bool(self._shim.return_last_only or return_last_only),
            bool(return_hidden_states),
            self._shim.logits_dtype,
            self._wanted,
        )
        output, sown = call(
            self.config.model,
            options,
            self._params,
            tokens,
            images,
            cache,
            positions,
            attention_mask,
        )
        _merge(self.intermediates, sown)
        return output

    def _note(self, module: Any, method: str, value: Any) -> Any:
        site = Site(("embedder",), module, "embedder")
        if self._wanted is not None and self._wanted(site, method):
            sow(self.intermediates, site, method, value)
        return value


class Embedder:
    """Tokens to vectors and vectors to logits, outside of a forward pass."""

    def __init__(
        self,
        embedding: nn.AbstractEmbedding,
        logits_dtype: jnp.dtype | None,
        note: Callable[[Any, str, Any], Any],
    ):
        self._embedding = embedding
        self._logits_dtype = logits_dtype
        self._note = note

    def encode(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Rows of the table times √D."""
        return self._note(self._embedding, "encode", self._embedding.encode(tokens))

    def decode(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Inner products with every row, without a soft cap."""
        logits = self._embedding.decode(x).astype(self._logits_dtype or self._embedding.table.dtype)
        return self._note(self._embedding, "decode", logits)


def _merge(into: Intermediates, new: Intermediates) -> None:
    for name, value in new.items():
        if isinstance(value, tuple):
            into[name] = (*into.get(name, ()), *value)
        else:
            _merge(into.setdefault(name, {}), value)
