"""Text embeddings: a bidirectional transformer, mean pooling, linear heads, L2 normalization.

The model is a `Transformer` whose queries also see what comes after them (EmbeddingGemma,
arXiv:2509.20354). Where its parts come from is in `checkpoint`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import as_integer, check_kind, check_known, described
from equigemma._typing import Array, Float32, Int, PRNGKeyArray, typed
from equigemma.config import ModelConfig
from equigemma.nn import PADDING, AbstractEinsum, Einsum, Transformer
from equigemma.nn._summary import shallow_repr, summary
from equigemma.tokenizers import Tokenizer, check_tokenizer


SMALLEST = 32
"""Texts are padded to powers of two from here on: few programs serve all lengths."""


@dataclass(frozen=True, kw_only=True)
class EmbedderSettings:
    """Preprocessing of texts and postprocessing of embeddings.

    `sentence-transformers` has it in files beside the model. The defaults are those of
    EmbeddingGemma, without its prompts.
    """

    prefix: tuple[int, ...] = (2,)
    """Ids before every text."""
    suffix: tuple[int, ...] = (1,)
    """Ids after every text."""
    max_length: int | None = 2048
    """Tokens that the model reads of a text, `prefix` and `suffix` among them: of a longer one the
    end is left out. None: there is no limit."""
    do_lower_case: bool = False
    prompts: tuple[tuple[str, str], ...] = ()
    """Names of prompts, and what they put before a text."""
    default_prompt_name: str | None = None
    """The prompt of a text for which none is asked."""
    truncate_dim: int | None = None
    """Numbers of a vector where none are asked for; None: all of them."""

    def __post_init__(self):
        around = len(self.prefix) + len(self.suffix)
        if self.max_length is not None and self.max_length <= around:
            raise ValueError(
                f"max_length must leave room for a text beside the {around} tokens around it, got "
                f"{self.max_length}."
            )
        if self.truncate_dim is not None and self.truncate_dim < 1:
            raise ValueError(f"truncate_dim must be at least 1, got {self.truncate_dim}.")
        if self.default_prompt_name is not None:
            self.prompt(self.default_prompt_name)

    def prompt(self, name: str | None) -> str:
        """The prompt of this name; for None the default, or nothing.

        **Raises:** `ValueError` if there is none of this name.
        """
        name = self.default_prompt_name if name is None else name
        # As in sentence-transformers, these two always are.
        prompts = {"query": "", "document": "", **dict(self.prompts)}
        if name is not None and name not in prompts:
            raise ValueError(
                f"There is no prompt called {name!r}; the model has {', '.join(sorted(prompts))}."
            )
        return "" if name is None else prompts[name]


class Embedder(eqx.Module):
    """Hidden states of all tokens averaged, through linear maps, and divided by their length."""

    __pdoc__ = summary
    __repr__ = shallow_repr

    model: Transformer
    dense: tuple[AbstractEinsum, ...]
    settings: EmbedderSettings = eqx.field(static=True)
    """What `embed` does besides."""

    def __init__(
        self,
        config: ModelConfig,
        dense: Sequence[int] = (3072, 768),
        *,
        settings: EmbedderSettings = EmbedderSettings(),
        key: PRNGKeyArray,
        dtype: jnp.dtype | type = jnp.float32,
    ):
        """An embedder with random weights.

        **Arguments:**

        - `config`: of a bidirectional model.
        - `dense`: the sizes that the linear maps lead to.
        - `settings`: prompts, lengths and dimensions, which `embed` reads.
        - `key`: a key of `jax.random`.
        - `dtype`: of all weights.
        """
        sizes = isinstance(dense, Sequence) and not isinstance(dense, str)
        if not sizes or not all(isinstance(size, int) for size in dense):
            raise TypeError(f"`dense` must be a list of sizes, got {described(dense)}.")
        check_kind("settings", settings, EmbedderSettings, "Leave it out for the usual ones.")
        model_key, *keys = jax.random.split(key, 1 + len(dense))
        self.model = Transformer(config, key=model_key, dtype=dtype)
        sizes = (config.width, *dense)
        self.dense = tuple(
            Einsum("...D,DO->...O", shape, key=one, dtype=jnp.dtype(dtype))
            for shape, one in zip(zip(sizes, dense, strict=False), keys, strict=True)
        )
        self.settings = settings

    @typed
    def __call__(self, tokens: Int[Array, "*B L"]) -> Float32[Array, "*B D"]:
        """One vector of length 1 for each row of ids.

        **Arguments:** `tokens`: ids, −1 after the end of a row; at least one id in each row.

        **Returns:** `float32[*B D]`, D being the size of the last linear map.
        """
        real = tokens != PADDING
        steps = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
        hidden, _ = self.model.trunk(tokens, positions=jnp.where(real, steps, PADDING))
        with jax.named_scope("pool"):
            weights = real.astype(jnp.float32) / real.sum(-1, keepdims=True).astype(jnp.float32)
            x = jnp.einsum("...L,...LD->...D", weights, hidden.astype(jnp.float32))
            for dense in self.dense:
                x = dense(x)
            return unit(x)


@typed
def unit(x: Float32[Array, "*B D"]) -> Float32[Array, "*B D"]:
    """`x` divided by its length.

    **Arguments:** `x`: vectors along the last axis.

    **Returns:** vectors of length 1; one of zeros stays zeros.
    """
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def embed(
    embedder: Embedder,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    truncate_dim: int | None = None,
    truncate: bool = True,
    batch_size: int = 32,
) -> np.ndarray:
    """The vector of a text, `float32[D]`, or those of many, `float32[texts D]`.

    Their length is 1, so that the product of two is how alike they are. They are those of `encode`
    in `sentence-transformers` with `normalize_embeddings=True`, but for special tokens that are
    spelled out in a text: here they are text.

    Texts of like length are read together, and the vector of one depends on how many they are, up
    to rounding.

    Of a text with more tokens than `embedder.settings.max_length`, among them its prompt and
    the special tokens around it, the end is left out; `truncate=False` refuses it instead.

    **Arguments:**

    - `embedder`: as `load_embedder` gives it, or prepared or quantized.
    - `tokenizer`: that of the embedder.
    - `texts`: one text, or several in a list.
    - `prompt`: before every text. EmbeddingGemma was trained with `"task: search result | query: "`
      for questions and `"title: none | text: "` for what they are to find.
    - `prompt_name`: the name of a prompt that the model brings along, in place of `prompt`; see
      `embedder.settings.prompts`. Without either it is the model's default, which most have not.
    - `truncate_dim`: only so many numbers of each, brought to length 1 again; by default what
      `embedder.settings` says. EmbeddingGemma was trained for 768, 512, 256 and 128.
    - `truncate`: whether the end of a text that is too long is left out.
    - `batch_size`: texts that are read at once.

    **Returns:** `float32[D]` for one text, `float32[texts D]` for a list.

    **Raises:** `ValueError` if there is no text, or one without any token, for one that is too long
    if not `truncate`, for both `prompt` and `prompt_name`, or a name, size or batch that makes no
    sense.
    """
    check_kind("embedder", embedder, Embedder, "`eg.load_embedder` gives one.")
    check_tokenizer(tokenizer)
    check_known("embed", "Else use embedder(tokens).", embedder=embedder)
    is_list = isinstance(texts, Iterable) and not isinstance(texts, str)
    many: list[Any] = list(texts) if is_list else [texts]
    if not all(isinstance(text, str) for text in many):
        raise TypeError(f"`texts` must be a str or a list of str, got {texts!r:.60}.")
    if not many:
        raise ValueError("There is no text; there is nothing to make a vector of.")
    if prompt is not None and prompt_name is not None:
        raise ValueError("prompt and prompt_name were given; leave one of them out.")
    widest = jax.eval_shape(embedder, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[-1]
    usual = embedder.settings.truncate_dim
    kept = min(usual or widest, widest)
    kept = kept if truncate_dim is None else as_integer("truncate_dim", truncate_dim)
    if not 1 <= kept <= widest:
        raise ValueError(
            f"truncate_dim must be from 1 to {widest}, all that there is, got {truncate_dim}."
        )
    batch_size = as_integer("batch_size", batch_size, least=1)
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"`prompt` must be a str, got {described(prompt)}.")
    before = embedder.settings.prompt(prompt_name) if prompt is None else prompt
    rows = _rows(embedder.settings, tokenizer, [before + text for text in many], truncate)
    # Texts of like length together: a batch takes the time of its longest.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    vectors = np.empty((len(rows), kept), np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = max(SMALLEST, 1 << (len(rows[chosen[-1]]) - 1).bit_length())
        tokens = [[*rows[index], *repeat(-1, length - len(rows[index]))] for index in chosen]
        vectors[chosen] = _vectors(embedder, jnp.asarray(tokens, jnp.int32), kept)
    return vectors[0] if isinstance(texts, str) else vectors


def _rows(
    settings: EmbedderSettings, tokenizer: Tokenizer, texts: Sequence[str], truncate: bool
) -> list[list[int]]:
    """The ids of texts, with what comes around them."""
    prefix, suffix, longest = settings.prefix, settings.suffix, settings.max_length
    rows = []
    for number, text in enumerate(texts, start=1):
        # Character by character, as the library tokenizers does it: no letter looks at others.
        text = "".join(map(str.lower, text)) if settings.do_lower_case else text
        ids = tokenizer.encode(text, bos=False)
        room = len(ids) if longest is None else longest - len(prefix) - len(suffix)
        if len(ids) > room and not truncate:
            raise ValueError(
                f"Text {number} of {len(texts)} has {len(ids) + len(prefix) + len(suffix)} tokens "
                f"with its prompt, and the model reads {longest}: shorten it, or leave out "
                "truncate=False."
            )
        rows.append([*prefix, *ids[:room], *suffix])
        if not rows[-1]:
            raise ValueError(
                f"Text {number} of {len(texts)} is empty, and this model has no special tokens "
                "around it; there is nothing to make a vector of."
            )
    return rows


@eqx.filter_jit
def _vectors(embedder: Embedder, tokens: Int[Array, "B L"], size: int) -> Float32[Array, "B D"]:
    vectors = embedder(tokens)
    return vectors if size == vectors.shape[-1] else unit(vectors[:, :size])
