"""Strings in, strings out: a tokenizer around `equigemma.sampling`.

Nothing here knows how tokens are computed, and nothing in `sampling` knows what they spell.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from equigemma import sampling
from equigemma._typing import Array, Int
from equigemma.nn import Transformer
from equigemma.tokenizer import StreamingDecoder, Tokenizer


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] | None = None,
) -> str | list[str]:
    """What the model writes after `prompt`; a list of prompts gives a list, each as if alone.

    **Arguments:** `temperature`: 0 takes the likeliest token each time; above, tokens are drawn
    with `seed`. `stop`: ids that end the text, by default the tokenizer's own.

    **Raises:** `ValueError` for an empty prompt, a length below 1, a negative temperature.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    ended = tokenizer.special.stop if stop is None else stop
    generated = sampling.generate(
        model,
        encode(tokenizer, prompts),
        max_new_tokens=max_new_tokens,
        choose=sampling.at_temperature(temperature),
        stop=ended,
        key=jax.random.key(seed),
    )
    texts = [tokenizer.decode(row[row >= 0]) for row in np.asarray(generated.tokens)]
    return texts[0] if isinstance(prompt, str) else texts


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] | None = None,
) -> Iterator[str]:
    """The text of `generate` for one prompt, piece by piece, one piece for each token.

    A piece is empty while a character is incomplete; joined, the pieces are the whole text.
    Arguments and errors are those of `generate`.
    """
    steps = sampling.stream(
        model,
        encode(tokenizer, [prompt])[0],
        max_new_tokens=max_new_tokens,
        choose=sampling.at_temperature(temperature),
        stop=tokenizer.special.stop if stop is None else stop,
        key=jax.random.key(seed),
    )
    return _spell(tokenizer, steps)


def encode(tokenizer: Tokenizer, prompts: Sequence[str]) -> Int[Array, "B L"]:
    """The ids of all prompts, −1 after the shorter ones.

    **Raises:** `ValueError` if there is no prompt, or an empty one.
    """
    if not prompts or not all(prompts):
        raise ValueError("A prompt is empty; the model needs at least one character to go on from.")
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    return jnp.asarray([row + [-1] * (longest - len(row)) for row in rows], jnp.int32)


def _spell(tokenizer: Tokenizer, steps: Iterator[np.ndarray]) -> Iterator[str]:
    decoder = StreamingDecoder(tokenizer)
    for token in steps:
        yield decoder.push(int(token))
    if rest := decoder.finish():
        yield rest
