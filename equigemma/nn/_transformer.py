"""The language model: embedding, layers, final norm, unembedding."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._arguments import as_float_dtype, as_ids, as_key, check_kind, described
from equigemma._kernels import on_auto_axes
from equigemma._typing import (
    Array,
    ArrayLike,
    Bool,
    DTypeLike,
    Float,
    Float32,
    Int,
    Integer,
    PRNGKeyArray,
    UInt8,
    typed,
)
from equigemma.config import AltUpConfig, ModelConfig
from equigemma.nn import _placed as placed
from equigemma.nn._altup import AltUpStream
from equigemma.nn._altup_block import AltUpBlock
from equigemma.nn._block import AbstractBlock, Block
from equigemma.nn._cache import AbstractKVCache, length_after
from equigemma.nn._context import Context, first_without_keys, lent, take_tokens
from equigemma.nn._embed import AbstractEmbedding, Embedding, activation_dtype
from equigemma.nn._inputs import Inputs, as_kept, complete
from equigemma.nn._layers import check_layers, replaced, with_attention_config
from equigemma.nn._model_cache import Cache, drop_shared_kv, share_kv
from equigemma.nn._norm import RMSNorm
from equigemma.nn._per_layer import PerLayerEmbedding
from equigemma.nn._rope import rope_sin_cos
from equigemma.nn._stack import Stacked, check_unstacked
from equigemma.nn._stream import AbstractStream, PlainStream, split_stream
from equigemma.nn._summary import repr_doc, sizes
from equigemma.nn._tap import Tap
from equigemma.nn._vision import (
    Vision,
    indices_after_insertion,
    insert_image_tokens,
    is_image_token,
    merge_embeddings,
    preprocess_images,
)


class Output(eqx.Module):
    """Output of a model.

    `hidden_states` are those that the logits are made from: after the last norm.
    """

    logits: Float32[Array, "*B L V"]
    cache: Cache | None
    hidden_states: Float[Array, "*B L D"]


class Transformer(eqx.Module):
    """A Gemma as a pytree: every array is a leaf, everything else is static.

    ```python
    >>> import equigemma as eg, equinox as eqx, jax, jax.numpy as jnp
    >>> from dataclasses import replace
    >>> config = eg.variants.get("gemma3-270m")
    >>> small = replace(config, vocab=1_000, layers=config.layers[:1])
    >>> model = eg.Transformer(small, key=jax.random.key(0), dtype=jnp.bfloat16)
    >>> model
    Transformer(1 layer, 6,214,272 parameters, bfloat16)
    >>> eqx.filter_jit(model)(jnp.array([2, 818, 527])).logits.shape
    (3, 1000)

    ```
    """

    embedding: AbstractEmbedding
    embed: Tap
    per_layer: PerLayerEmbedding | None
    stream: AbstractStream
    layers: tuple[AbstractBlock, ...] | Stacked
    final_norm: RMSNorm
    lm_head: AbstractEmbedding | None
    """The output projection; None: the embedding table is tied to it."""
    vision: Vision | None
    config: ModelConfig = eqx.field(static=True)

    def __init__(self, config: ModelConfig, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32):
        """A model with random weights.

        **Arguments:**

        - `config`: the architecture: one of `variants`, or your own.
        - `key`: a key of `jax.random`.
        - `dtype`: of the weights, and of activations, but for float16, beside which they are
          float32. Those of a vision tower are float32, in which it computes.
        """
        check_kind("config", config, ModelConfig, "`variants.get` gives one by its name.")
        key = as_key("key", key)
        dtype = as_float_dtype("dtype", dtype)
        embedding_key, *layer_keys = jax.random.split(key, 1 + len(config.layers))
        width, stream, per_layer = config.width, config.stream, config.per_layer
        self.per_layer = None
        if per_layer is not None:
            embedding_key, per_layer_key = jax.random.split(embedding_key)
            self.per_layer = PerLayerEmbedding(
                width, len(config.layers), per_layer, key=per_layer_key, dtype=dtype
            )
        self.stream, block = PlainStream(), Block
        if isinstance(stream, AltUpConfig):
            embedding_key, stream_key = jax.random.split(embedding_key)
            self.stream = AltUpStream(width, stream, key=stream_key, dtype=dtype)
            block = partial(AltUpBlock, stream=stream)
        self.embedding = Embedding(config.vocab, width, key=embedding_key, dtype=dtype)
        self.embed = Tap()
        self.layers = tuple(
            block(width, layer, per_layer=per_layer, key=layer_key, dtype=dtype)
            for layer, layer_key in zip(config.layers, layer_keys, strict=True)
        )
        self.final_norm = RMSNorm(config.width, config.final_norm, dtype=dtype)
        self.lm_head = None
        if config.lm_head == "untied":
            head_key = jax.random.fold_in(key, 2)
            self.lm_head = Embedding(config.vocab, width, key=head_key, dtype=dtype)
        self.vision = None
        if config.vision is not None:
            vision_key = jax.random.fold_in(key, 1)
            self.vision = Vision(width, config.vision, key=vision_key, dtype=jnp.dtype("float32"))
        self.config = config

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations: that of the weights unless they are quantised or float16.

        Float16 is a way to store weights: beside them activations are float32, as those of these
        models exceed its range.
        """
        return activation_dtype(self.embedding.dtype)

    @property
    def output_embedding(self) -> AbstractEmbedding:
        """The embedding whose `decode` gives the logits: `lm_head`, or `embedding` where tied."""
        return self.embedding if self.lm_head is None else self.lm_head

    def untied(self) -> "Transformer":
        """The same model with an output projection of its own, which begins as the embedding."""
        if self.lm_head is not None:
            return self
        config = dataclasses.replace(self.config, lm_head="untied")
        return replaced(self, lm_head=self.embedding, config=config)

    @typed
    def with_layers(self, layers: Iterable[SupportsIndex]) -> "Transformer":
        """The same model of chosen layers, with the config of that model.

        Arrays are shared with this model; only of a per-layer embedding the parts of the chosen
        layers are copied. A layer that is there several times is as many layers to training, each
        with weights of its own. Adapters stay around what they are around.

        ```python
        >>> import equigemma as eg, jax
        >>> from dataclasses import replace
        >>> config = eg.variants.get("gemma3-270m")
        >>> ffw = eg.config.FeedForwardConfig(hidden_dim=3)
        >>> layers = tuple(replace(layer, ffw=ffw) for layer in config.layers)
        >>> small = replace(config, vocab=7, width=5, layers=layers)
        >>> model = eg.Transformer(small, key=jax.random.key(0)).with_layers([0, 1, 5, 5, -1])
        >>> [layer.attention.window for layer in model.config.layers]
        [512, 512, None, None, None]

        ```

        **Arguments:** `layers`: indices in the new order, negative ones from the end.

        **Raises:** `ValueError` for an index that is none, no layer, a stacked model, a layer
        without the one before it whose keys it attends to, and for a per-layer embedding that is
        prepared, quantized or adapted: choose layers before that.
        """
        check_unstacked(self)
        check_layers(self.layers, self.config)
        indices = list(layers)
        config = self.config.with_layers(indices)
        chosen = (
            with_attention_config(self.layers[index], layer.attention)
            for index, layer in zip(indices, config.layers, strict=True)
        )
        per_layer = None if self.per_layer is None else self.per_layer.with_layers(indices)
        return replaced(self, layers=tuple(chosen), per_layer=per_layer, config=config)

    __pdoc__ = repr_doc

    def __repr__(self) -> str:
        # `wadler_lindig.pprint(model, respect_pdoc=False)` prints every weight of every layer.
        count = len(self.config.layers)
        return f"Transformer({count} layer{'' if count == 1 else 's'}, {sizes(self)})"

    @typed
    @on_auto_axes(placed.of_call)
    def __call__(
        self,
        tokens: Integer[ArrayLike, "*B L"] | Sequence[Any],
        *,
        images: UInt8[ArrayLike, "*B I height width 3"]
        | UInt8[ArrayLike, "*B height width 3"]
        | None = None,
        positions: Integer[ArrayLike, "*B L_with_images"] | Sequence[Any] | None = None,
        mask: Bool[ArrayLike, "*B L_with_images S"] | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Logits for the token after each of `tokens`.

        Under `jit`, where values are unknown, NaN stands for what is an error outside of it: in the
        rows with an id outside of the vocabulary, in those beyond the capacity of `cache`, and in
        those whose `positions` do not continue it. Other rows are not touched.

        **Arguments:**

        - `tokens`: ids in [0, V), of any integer type; −1 is padding, where `positions` are −1 or
          there are `images`.
        - `images`: of any size, several for each row or one. Each `config.vision.start` among the
          tokens of a row is one of them; behind it the model reads their soft tokens too, of which
          logits and hidden states are left out. A row with fewer leaves the last ones over.
        - `positions`: absolute, −1 for padding before or after the text of a row. By default tokens
          continue the tokens in `cache`, or start at 0. Like `mask`, with `images` they are of what
          the model reads, as `insert_image_tokens` gives it.
        - `mask`: replaces "not ahead and not padding"; windows are applied on top. Without a cache
          S is L. With one, column s is for the key at position s, and S the capacity that
          `init_cache` was given; where all layers are local, any S that holds all positions.
        - `cache`: keys and values of earlier tokens, from `init_cache`; the result has the
          updated cache.

        **Returns:** logits in float32, the updated cache (None if none was given), and the hidden
        states that the logits are made from.

        **Raises:** jaxtyping's `TypeCheckError` on a wrong dtype or axis; `ValueError` for an id
        outside of the vocabulary, sizes that do not fit each other, a cache that is of another
        model or full, or for images where there is no vision tower.
        """
        options = {"positions": positions, "mask": mask, "segments": None, "cache": cache}
        if images is None:
            x, cache = self._hidden_states(
                complete(self.config, tokens, soft_tokens=None, **options)
            )
            return Output(self.unembed(x), cache, x)
        vision = self._require_vision.config
        tokens, images = as_ids("tokens", tokens), jnp.asarray(images)
        if images.ndim == tokens.ndim + 2:
            images = images[..., None, :, :, :]
        if images.shape[:-4] != tokens.shape[:-1]:
            raise ValueError(
                f"`images` must have the batch of `tokens`, {tokens.shape[:-1]}, in front: those "
                f"of each row; got {described(images)}."
            )
        soft_tokens = self.encode_images(images)
        number = images.shape[-4]
        read = insert_image_tokens(tokens, vision, number)
        x, cache = self._hidden_states(
            complete(self.config, read, soft_tokens=soft_tokens, **options)
        )
        x = jnp.take_along_axis(
            x, indices_after_insertion(tokens, vision, number)[..., None], axis=-2
        )
        return Output(self.unembed(x), cache, x)

    @typed
    @on_auto_axes(placed.of_images)
    def encode_images(self, images: UInt8[Array, "*B height width 3"]) -> Float32[Array, "*B M D"]:
        """The soft tokens of images of any size.

        **Raises:** `ValueError` if there is no vision tower.
        """
        vision = self._require_vision
        return vision(preprocess_images(images, vision.config.pixels))

    @property
    def _require_vision(self) -> Vision:
        if self.vision is None:
            raise ValueError(
                "Images were given, but this model reads text only: it has no vision tower. Leave "
                "them out, or load a checkpoint that has one."
            )
        return self.vision

    @typed
    @on_auto_axes(placed.of_trunk)
    def trunk(
        self,
        tokens: Integer[ArrayLike, "*B L"] | Sequence[Any],
        *,
        soft_tokens: Float[Array, "*B I M D"] | None = None,
        positions: Integer[ArrayLike, "*B L"] | Sequence[Any] | None = None,
        mask: Bool[ArrayLike, "*B L S"] | None = None,
        segments: Integer[ArrayLike, "*B L"] | Sequence[Any] | None = None,
        cache: Cache | None = None,
        keep: Integer[ArrayLike, "*B R"] | Sequence[Any] | None = None,
    ) -> tuple[Float[Array, "*B kept D"], Cache | None]:
        """Everything but the logits: hidden states after the last norm, and the cache.

        **Arguments:**

        - `tokens`, `positions`, `mask`, `cache`: as `__call__`.
        - `soft_tokens`: what `encode_images` made of the images of each row. The tokens are then
          those that `insert_image_tokens` gives: id −2 − k is soft token k of the row, −1 is
          padding. An image must lie within one call.
        - `segments`: for rows of several texts, which of them each token is part of; they do not
          attend to each other, and positions start anew with each.
        - `keep`: indices, in [0, L), of the tokens whose hidden states are returned; None: of all.
          The cache is the same. Layers after the last with keys of its own compute these tokens
          only, but with segments and in a stacked model without a cache.

        **Raises:** as `__call__`; `ValueError` for segments with a cache, and for a `keep` that
        does not fit `tokens`.
        """
        options = {"positions": positions, "mask": mask, "segments": segments, "cache": cache}
        inputs = complete(self.config, tokens, soft_tokens=soft_tokens, **options)
        return self._hidden_states(inputs, None if keep is None else as_kept(keep, inputs.tokens))

    def _hidden_states(
        self, inputs: Inputs, keep: Int[Array, "*B R"] | None = None
    ) -> tuple[Float[Array, "*B kept D"], Cache | None]:
        """What `trunk` returns; rows that failed are NaN."""
        check_layers(self.layers, self.config)
        cache, sequence = inputs.cache, inputs.sequence
        x, per_layer_inputs = self._embedded(inputs)
        kinds = {(layer.attention.head_dim, layer.attention.rope) for layer in self.config.layers}
        ropes = {kind: rope_sin_cos(sequence.positions, *kind) for kind in kinds}
        x, context = self.stream.expand(x), Context(sequence, ropes, per_layer_inputs)
        layer_caches = share_kv(self.config, cache)
        if isinstance(self.layers, Stacked) and cache is None:
            x = self.layers(x, sequence, ropes, self.config)
            x = x if keep is None else take_tokens(x, keep)
        else:
            x = self._through(x, context, layer_caches, keep)
        x = self.final_norm(self.stream.reduce(x))
        if inputs.failed is not None:
            x = jnp.where(inputs.failed[..., None, None], jnp.asarray(jnp.nan, x.dtype), x)
        if cache is not None:
            cache = Cache(
                drop_shared_kv(layer_caches), length_after(cache.length, sequence.positions)
            )
        return x, cache

    def _through(
        self,
        x: Float[Array, "..."],
        context: Context,
        layer_caches: list[AbstractKVCache | None],
        keep: Int[Array, "*B R"] | None,
    ) -> Float[Array, "..."]:
        """The stream after all layers, of the tokens to keep; `layer_caches` are replaced."""
        layers = self.layers
        if isinstance(layers, Stacked):
            layers = layers.one_by_one()
        # Texts of one row are told apart by a number for each key: queries are all tokens then.
        all_tokens = keep is None or context.sequence.segment_ids is not None
        narrow = len(layers) if all_tokens else first_without_keys(self.config)
        for index, (layer, config) in enumerate(zip(layers, self.config.layers, strict=True)):
            if keep is not None and index == narrow:
                x, context, layer_caches[:] = (
                    take_tokens(x, keep),
                    context.only(keep),
                    lent(layer_caches),
                )
            layer_cache, rope = (
                layer_caches[self.config.owner(index)],
                context.rope(config.attention),
            )
            with jax.named_scope(f"layer_{index}"):
                x, layer_caches[index] = layer(
                    x, context.sequence, rope, layer_cache, context.per_layer_input(index)
                )
            x = split_stream(x, context.sequence.positions)
        return take_tokens(x, keep) if keep is not None and narrow == len(layers) else x

    def _embedded(
        self, inputs: Inputs
    ) -> tuple[Float[Array, "*B L D"], Float[Array, "*B L J P"] | None]:
        """Embeddings of the first layer, and per-layer inputs if the model has them."""
        tokens, soft_tokens = inputs.tokens, inputs.soft_tokens
        if soft_tokens is None:
            x = self.embedding.encode(tokens).astype(self.dtype)
        else:
            text = jnp.where(is_image_token(tokens), 0, tokens)
            x = merge_embeddings(
                self.embedding.encode(text).astype(self.dtype), tokens, soft_tokens
            )
        x = split_stream(self.embed(x, inputs), tokens)
        return x, None if self.per_layer is None else self.per_layer(tokens, x)

    @typed
    @on_auto_axes(placed.of_unembed)
    def unembed(self, x: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Logits of hidden states, soft-capped if the config says so."""
        if x.shape[-1] != self.config.width:
            raise ValueError(
                f"`x` must have vectors of the model's width, {self.config.width}; got "
                f"{described(x)}."
            )
        with jax.named_scope("unembed"):
            logits = self.output_embedding.decode(x)
            softcap = self.config.final_softcap
            return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def check_models(tree: Any) -> None:
    """Refuses models within a tree whose layers are not those of their configs.

    **Arguments:** `tree`: a model, or any tree with some.

    **Raises:** `ValueError`.
    """
    for part in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Transformer)):
        if isinstance(part, Transformer):
            check_layers(part.layers, part.config)
