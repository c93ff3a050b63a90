"""Texts as vectors: a model that reads a text as a whole, and what makes one vector of it.

The model is a `Transformer` whose queries also see what comes after them (EmbeddingGemma,
arXiv:2509.20354). Where its parts come from is in `checkpoint`.
"""

from collections.abc import Sequence
from itertools import repeat

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._typing import Array, Float32, Int, PRNGKeyArray, typed
from equigemma.config import ModelConfig
from equigemma.nn import AbstractEinsum, Einsum, Transformer
from equigemma.tokenizer import Tokenizer


SMALLEST = 32
"""Texts are padded to powers of two from here on: few programs serve all lengths."""


class Embedder(eqx.Module):
    """Hidden states of all tokens averaged, through linear maps, and divided by their length."""

    model: Transformer
    dense: tuple[AbstractEinsum, ...]
    suffix: tuple[int, ...] = eqx.field(static=True)
    """Ids after every text."""

    def __init__(
        self,
        config: ModelConfig,
        dense: Sequence[int] = (3072, 768),
        *,
        suffix: Sequence[int] = (1,),
        key: PRNGKeyArray,
        dtype: jnp.dtype | type = jnp.float32,
    ):
        """Random weights. `dense` are the sizes that the linear maps lead to."""
        model_key, *keys = jax.random.split(key, 1 + len(dense))
        self.model = Transformer(config, key=model_key, dtype=dtype)
        sizes = (config.width, *dense)
        self.dense = tuple(
            Einsum("...D,DO->...O", shape, key=one, dtype=jnp.dtype(dtype))
            for shape, one in zip(zip(sizes, dense, strict=False), keys, strict=True)
        )
        self.suffix = tuple(suffix)

    @typed
    def __call__(self, tokens: Int[Array, "*B L"]) -> Float32[Array, "*B D"]:
        """One vector of length 1 for each row of ids; −1 is padding, after the text."""
        real = tokens >= 0
        steps = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
        hidden, _ = self.model.trunk(jnp.maximum(tokens, 0), positions=jnp.where(real, steps, -1))
        with jax.named_scope("pool"):
            weights = real.astype(jnp.float32) / real.sum(-1, keepdims=True).astype(jnp.float32)
            x = jnp.einsum("...L,...LD->...D", weights, hidden.astype(jnp.float32))
            for dense in self.dense:
                x = dense(x)
            return unit(x)


@typed
def unit(x: Float32[Array, "*B D"]) -> Float32[Array, "*B D"]:
    """`x` divided by its length."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def embed(
    embedder: Embedder,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    prompt: str = "",
    size: int | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """The vector of a text, `float32[D]`, or those of many, `float32[texts D]`.

    Their length is 1, so that the product of two is how alike they are.

    **Arguments:**

    - `prompt`: before every text. EmbeddingGemma was trained with
      `"task: search result | query: "` for questions and `"title: none | text: "` for what they are
      to find.
    - `size`: only so many numbers of each, brought to length 1 again. EmbeddingGemma was trained
      for 768, 512, 256 and 128.
    - `batch_size`: texts that are read at once.

    **Raises:** `ValueError` for an empty text, or a size or batch that makes no sense.
    """
    many = [texts] if isinstance(texts, str) else list(texts)
    if not many or not all(many):
        raise ValueError("A text is empty; there is nothing to make a vector of.")
    widest = jax.eval_shape(embedder, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[-1]
    kept: int = widest if size is None else size
    if not 1 <= kept <= widest:
        raise ValueError(f"size must be from 1 to {widest}, all that there is, got {size}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    rows = [[*tokenizer.encode(prompt + text), *embedder.suffix] for text in many]
    # Texts of like length together: a batch takes the time of its longest.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    vectors = np.empty((len(rows), kept), np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = max(SMALLEST, 1 << (len(rows[chosen[-1]]) - 1).bit_length())
        tokens = [[*rows[index], *repeat(-1, length - len(rows[index]))] for index in chosen]
        vectors[chosen] = _vectors(embedder, jnp.asarray(tokens, jnp.int32), kept)
    return vectors[0] if isinstance(texts, str) else vectors


@eqx.filter_jit
def _vectors(embedder: Embedder, tokens: Int[Array, "B L"], size: int) -> Float32[Array, "B D"]:
    vectors = embedder(tokens)
    return vectors if size == vectors.shape[-1] else unit(vectors[:, :size])
