"""Log-likelihood of a text, token by token, and its perplexity."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import (
    as_float_dtype,
    as_ids,
    bucketed,
    check_kind,
    check_known,
    described,
)
from equigemma._typing import Array, ArrayLike, DTypeLike, Float32, Int, Integer
from equigemma.nn import Cache, Transformer, init_cache
from equigemma.tokenizers import Tokenizer, check_tokenizer


Text = str | Sequence[int] | Integer[ArrayLike, " tokens"]
"""A text, or its token ids from the "beginning of sequence" on."""

CHUNK = 512
"""Tokens that go through the model at once; what came before them is in the cache."""

ROWS = 32
"""Tokens whose logits are there at once: over a quarter of a million ids they are 34 MB."""


@dataclass(frozen=True, eq=False)
class Score:
    """Log-probabilities of a given text.

    Logarithms are natural, of the model's own probabilities.
    """

    tokens: np.ndarray
    """Ids of the text, int32; without the "beginning of sequence" that was before them."""
    logprobs: np.ndarray
    """Of each token after all that come before it, float32."""

    @property
    def logprob(self) -> float:
        """Of the whole text."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def mean_nll(self) -> float:
        """Negative log-likelihood per token: the loss that training reduces."""
        return -self.logprob / len(self.tokens)

    @property
    def perplexity(self) -> float:
        """Among how many tokens the model is undecided on average."""
        # Beyond, a float64 has no room.
        return math.exp(self.mean_nll) if self.mean_nll < 700 else math.inf


@overload
def score(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: str | list[int] | np.ndarray | Array,
    *,
    progress: Callable[[int], None] | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Score: ...


@overload
def score(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: list[str] | tuple[str, ...],
    *,
    progress: Callable[[int], None] | None = None,
    cache_dtype: DTypeLike | None = None,
) -> list[Score]: ...


@overload
def score(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Text | Iterable[Text],
    *,
    progress: Callable[[int], None] | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Score | list[Score]: ...


def score(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Text | Iterable[Text],
    *,
    progress: Callable[[int], None] | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Score | list[Score]:
    """The score of a text; a list of texts gives a list. A text may be given as its token ids.

    Texts are read one after the other, and a long one in chunks: besides the model there is memory
    for one cache, a chunk, and the logits of a few tokens. So a score is the same bit for bit
    whatever other texts there are. That of chunks is that of the text as a whole up to rounding.

    **Arguments:**

    - `model`: a causal `Transformer`.
    - `tokenizer`: that of the model.
    - `texts`: one text or many, each a string or its token ids.
    - `progress`: called after each chunk with the number of its tokens.
    - `cache_dtype`: of keys and values, by default the model's; int8 rounds them.

    **Returns:** a `Score` for one text, else a list of them in the order of the texts.

    **Raises:** `ValueError` for a text without any token, or with ids outside of the vocabulary.
    """
    is_one = _is_text(texts)
    many: Iterable[Any] = [texts] if is_one else texts
    found = list(scores(model, tokenizer, many, progress=progress, cache_dtype=cache_dtype))
    return found[0] if is_one else found


def scores(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Iterable[Text],
    *,
    progress: Callable[[int], None] | None = None,
    cache_dtype: DTypeLike | None = None,
) -> Iterator[Score]:
    """The scores of many texts, each as soon as it is known. See `score`."""
    check_kind("model", model, Transformer, "`eg.load` gives one.")
    check_tokenizer(tokenizer)
    check_known("score", "Else use model(tokens).logits.", model=model)
    if not isinstance(texts, Iterable):
        raise TypeError(_not_texts(texts))
    if cache_dtype is not None:
        cache_dtype = as_float_dtype("cache_dtype", cache_dtype, or_=[jnp.int8])
    for number, text in enumerate(texts, start=1):
        ids = _encode(tokenizer, text, number, model.config.vocab)
        pieces = []
        # The last token has nothing after it to be scored.
        cache = init_cache(
            model.config,
            (),
            capacity=bucketed(len(ids) - 1, CHUNK),
            dtype=cache_dtype or model.dtype,
        )
        for start in range(0, len(ids) - 1, CHUNK):
            piece = ids[start : start + CHUNK + 1]
            count = len(piece) - 1
            size = min(CHUNK, bucketed(count, ROWS))
            padded = np.full(size + 1, -1, np.int32)
            padded[: len(piece)] = piece
            logprobs, cache = _read(model, jnp.asarray(padded), cache)
            pieces.append(np.asarray(logprobs)[:count])
            if progress is not None:
                progress(count)
        yield Score(ids[1:], np.concatenate(pieces))


def _not_texts(value: Any, place: str = "") -> str:
    return f"`texts` must be a str, token ids or a list of those, got {described(value)}{place}."


def _is_text(text: Any) -> bool:
    """Whether this is one text, as a string or as ids."""
    if isinstance(text, jax.Array | np.ndarray):
        return text.ndim == 1
    if isinstance(text, str) or not isinstance(text, Sequence):
        return isinstance(text, str)
    return len(text) > 0 and all(not isinstance(one, str) and np.ndim(one) == 0 for one in text)


def _encode(tokenizer: Tokenizer, text: Any, number: int, vocab: int) -> np.ndarray:
    if not _is_text(text):
        raise TypeError(_not_texts(text, f" as text {number}"))
    ids = np.asarray(as_ids("texts", tokenizer.encode(text) if isinstance(text, str) else text))
    if len(ids) < 2:
        raise ValueError(f"Text {number} is empty: there is nothing to score.")
    if outside := ids[(ids < 0) | (ids >= vocab)].tolist():
        raise ValueError(
            f"Text {number} has the id {outside[0]}, and the vocabulary ends at {vocab - 1}. Take "
            "the tokenizer of this model."
        )
    return ids


@partial(jax.jit, donate_argnums=2)
def _read(
    model: Transformer, tokens: Int[Array, " one_more"], cache: Cache
) -> tuple[Float32[Array, " L"], Cache]:
    """Of each token but the first the log-probability, and the cache after all but the last."""
    inputs, targets = tokens[:-1], jnp.maximum(tokens[1:], 0)
    steps = jnp.arange(inputs.size, dtype=jnp.int32)
    # The very last token is a target only. Padding after the text is neither.
    positions = jnp.where(tokens[1:] >= 0, cache.length + steps, -1)
    hidden, after = model.trunk(jnp.maximum(inputs, 0), positions=positions, cache=cache)
    assert after is not None

    def logprobs(rows: tuple[Array, Array]):
        hidden, targets = rows
        logits = model.unembed(hidden)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    parts = (hidden.reshape(-1, ROWS, hidden.shape[-1]), targets.reshape(-1, ROWS))
    return jax.lax.map(logprobs, parts).reshape(-1), after
