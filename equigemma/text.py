"""Strings in, strings out: a tokenizer around `equigemma.sampling`.

Nothing here knows how tokens are computed, and nothing in `sampling` knows what they spell. That is
why strings that end a text are looked for here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, TypedDict, Unpack, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma import sampling
from equigemma._arguments import as_integer, check_kind
from equigemma._detokenizer import IncrementalDetokenizer as IncrementalDetokenizer
from equigemma._detokenizer import checked_stop_strings as checked_stop_strings
from equigemma._detokenizer import shortened
from equigemma._typing import Array, ArrayLike, DTypeLike, Float, Int
from equigemma.config import SigLIPConfig
from equigemma.images import Image, as_list, as_rgb
from equigemma.nn import Transformer, Vision, insert_image_tokens, preprocess_images
from equigemma.sampling._ahead import stream_ahead as _stream_ahead
from equigemma.tokenizers import Tokenizer, check_tokenizer


IMAGE = "<start_of_image>"
"""What stands for an image in a prompt that comes with images."""


class _Options(TypedDict, total=False):
    max_new_tokens: int
    temperature: float
    sampler: sampling.AbstractSampler | None
    seed: int
    stop_tokens: Iterable[int] | None
    stop_strings: Sequence[str]
    cache_dtype: DTypeLike | None


@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    images: Image | Sequence[Image] | None = None,
    num_samples: None = None,
    **options: Unpack[_Options],
) -> str: ...


@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    images: Image | Sequence[Image] | None = None,
    num_samples: int,
    **options: Unpack[_Options],
) -> list[str]: ...


@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: list[str] | tuple[str, ...],
    *,
    images: Sequence[Image | Sequence[Image]] | None = None,
    num_samples: None = None,
    **options: Unpack[_Options],
) -> list[str]: ...


@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: list[str] | tuple[str, ...],
    *,
    images: Sequence[Image | Sequence[Image]] | None = None,
    num_samples: int,
    **options: Unpack[_Options],
) -> list[list[str]]: ...


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    *,
    images: Image | Sequence[Image] | Sequence[Sequence[Image]] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    sampler: sampling.AbstractSampler | None = None,
    seed: int = 0,
    stop_tokens: Iterable[int] | None = None,
    stop_strings: Sequence[str] = (),
    num_samples: int | None = None,
    cache_dtype: DTypeLike | None = None,
) -> str | list[str] | list[list[str]]:
    """Generates text after `prompt`; a list of prompts gives a list, each as if alone.

    That is up to rounding: in bfloat16 the same prompt may give another text in a list than alone,
    once two tokens are nearly as likely as each other. See `sampling.generate`, also for how much.
    Only a call for each depends on no other, or a model in float32 in all but the rarest cases.

    A process that is forked after JAX has computed anything hangs in its first computation, and JAX
    warns of it. Start processes before that, or by `multiprocessing.get_context("spawn")`.

    **Arguments:**

    - `model`: a causal `Transformer`, in any form: prepared, quantized, with adapters.
    - `tokenizer`: that of the model.
    - `prompt`: a text, or several in a list.
    - `images`: one or several that belong to the prompt, of any size: paths, arrays
      `uint8[height width]` or with 1 to 4 channels, or Pillow's. For a list of prompts, a list with
      the images of each. Each `<start_of_image>` in a prompt is one of its images; if it has none,
      its images are before the text. Around each image come two line ends, as a token of their own
      whatever is beside it (see `nn.insert_image_tokens`).
    - `max_new_tokens`: the most tokens that are generated for a prompt.
    - `temperature`: 0 takes the likeliest token each time; above, tokens are drawn with `seed`.
    - `sampler`: every other control, in place of `temperature`:
      `sampling.make_sampler(temperature=0.7, top_k=64, top_p=0.95, repetition_penalty=1.1)`.
    - `seed`: of what is drawn.
    - `stop_tokens`: ids that end the text, by default the tokenizer's own.
    - `stop_strings`: strings that end the text, which is cut before them, wherever they begin and
      however many tokens spell them. Where one completes first it counts, the longer of two that
      end together. Tokens are then computed one by one, not in one program.
    - `num_samples`: so many texts for each prompt, as a list in place of each text.
    - `cache_dtype`: of keys and values, by default the model's; int8 rounds them, in half of the
      memory of bfloat16.

    **Returns:** the new text, without the prompt; for a list of prompts a list; with `num_samples`
    a list in place of each text.

    **Raises:** `ValueError` for an empty prompt or stop string, a length below 1, a negative
    temperature, both `temperature` and `sampler`, or images that the model or the prompt has no
    place for.
    """
    _check_model(model, tokenizer)
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens)
    if num_samples is not None:
        num_samples = as_integer("num_samples", num_samples, least=1)
    prompts = [prompt] if isinstance(prompt, str) else _listed(prompt)
    shown = [images] if isinstance(prompt, str) and images is not None else images
    tokens, soft_tokens = encode_prompts(model, tokenizer, prompts, shown)
    stops = checked_stop_strings(stop_strings)
    options = _options(model, tokenizer, max_new_tokens, temperature, sampler, seed, stop_tokens)
    options |= {"soft_tokens": soft_tokens, "cache_dtype": cache_dtype}
    if stops:
        steps = sampling.stream(model, tokens, num_samples=num_samples, **options)
        texts = _detokenize_all(tokenizer, steps, stops, len(prompts) * (num_samples or 1))
    else:
        generated = sampling.generate(model, tokens, num_samples=num_samples, **options)
        rows = np.asarray(generated.tokens).reshape(-1, max_new_tokens)
        texts = [tokenizer.decode(row[row >= 0]) for row in rows]
    if num_samples is None:
        return texts[0] if isinstance(prompt, str) else texts
    answers = [texts[start : start + num_samples] for start in range(0, len(texts), num_samples)]
    return answers[0] if isinstance(prompt, str) else answers


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    images: Image | Sequence[Image] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    sampler: sampling.AbstractSampler | None = None,
    seed: int = 0,
    stop_tokens: Iterable[int] | None = None,
    stop_strings: Sequence[str] = (),
    cache_dtype: DTypeLike | None = None,
) -> Iterator[str]:
    """The text of `generate` for one prompt, piece by piece, one piece for each token.

    A piece is empty while a character is incomplete, or while the text may be the beginning of a
    stop string, of which no part is ever given out; joined, the pieces are the whole text, that of
    one prompt alone.

    **Arguments:** those of `generate`, but for `num_samples`.

    **Returns:** an iterator over pieces of text.

    **Raises:** as `generate` does.
    """
    _check_model(model, tokenizer)
    stops = checked_stop_strings(stop_strings)
    options = _options(model, tokenizer, max_new_tokens, temperature, sampler, seed, stop_tokens)
    _check_one(prompt)
    shown = None if images is None else [images]
    tokens, soft_tokens = encode_prompts(model, tokenizer, [prompt], shown)
    options |= {
        "soft_tokens": None if soft_tokens is None else soft_tokens[0],
        "cache_dtype": cache_dtype,
    }
    steps = sampling.stream(model, tokens[0], **options)
    return _detokenize(tokenizer, steps, stops)


def stream_ahead(
    shapes: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampler: sampling.AbstractSampler | None = None,
    seed: int = 0,
    stop_strings: Sequence[str] = (),
    cache_dtype: DTypeLike | None = None,
) -> Callable[[Transformer], Iterator[str]]:
    """`stream` as a function of the model, which a thread compiles for from now on.

    **Arguments:** `shapes`: the model with a `jax.ShapeDtypeStruct` in place of each array, which
    `load` gives to its `on_shapes`. The others, and errors, are those of `stream`.
    """
    _check_model(shapes, tokenizer)
    stops = checked_stop_strings(stop_strings)
    options = _options(shapes, tokenizer, max_new_tokens, 0.0, sampler, seed, None)
    _check_one(prompt)
    tokens = encode(tokenizer, [prompt])
    steps = _stream_ahead(shapes, tokens[0], cache_dtype=cache_dtype, **options)
    return lambda model: _detokenize(tokenizer, steps(model), stops)


def _check_model(model: object, tokenizer: object) -> None:
    check_kind("model", model, Transformer, "`eg.load` gives one.")
    check_tokenizer(tokenizer)


def encode(tokenizer: Tokenizer, prompts: Sequence[str]) -> Int[np.ndarray, "B L"]:
    """The ids of all prompts, −1 after the shorter ones.

    **Arguments:**

    - `tokenizer`: that of the model.
    - `prompts`: at least one, none of them empty.

    **Returns:** `int32[B L]`, L being the length of the longest.

    **Raises:** `ValueError` if there is no prompt, or an empty one.
    """
    if not prompts or not all(prompts):
        raise ValueError("A prompt is empty; the model needs at least one character to go on from.")
    return _padded([tokenizer.encode(prompt) for prompt in prompts])


def encode_prompts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    images: Sequence[Image | Sequence[Image]] | None,
) -> tuple[Int[ArrayLike, "B L"], Float[Array, "B I M D"] | None]:
    """What `sampling` takes: ids, −1 after the shorter rows, and soft tokens if there are images.

    **Arguments:** `images`: those of each prompt; None if there are none at all.

    **Raises:** `ValueError`, see `generate`.
    """
    if images is None:
        return encode(tokenizer, prompts), None
    is_one = not isinstance(images, list | tuple) and len(as_list(images)) == 1
    if is_one or len(images) != len(prompts):
        count = "one of them" if is_one else len(images)
        raise ValueError(
            f"There are {len(prompts)} prompts and images for {count}; pass a list with the "
            "images of each, empty where there are none."
        )
    shown = [[] if each is None else as_list(each) for each in images]
    if not any(shown):
        return encode(tokenizer, prompts), None
    if model.vision is None:
        raise ValueError(
            "Images were given, but this model reads text only: it has no vision tower. Leave them "
            "out, or load a checkpoint that has one."
        )
    config = model.vision.config
    rows = [
        _encode_with_images(tokenizer, prompt, len(each), config)
        for prompt, each in zip(prompts, shown, strict=True)
    ]
    most = max(map(len, shown))
    tokens = insert_image_tokens(jnp.asarray(_padded(rows)), config, most)
    blank = jnp.zeros((config.num_soft_tokens, model.config.width), jnp.float32)
    soft_tokens = [[encode_image(model.vision, one) for one in each] for each in shown]
    return tokens, jnp.stack(
        [jnp.stack([*each, *repeat(blank, most - len(each))]) for each in soft_tokens]
    )


def encode_image(vision: Vision, image: Image) -> Float[Array, "M D"]:
    """The soft tokens of one image. Programs are shared by all images, but for the resizing."""
    size = vision.config.pixels
    return _encode_image(vision, preprocess_images(jnp.asarray(as_rgb(image)), size))


@eqx.filter_jit
def _encode_image(vision: Vision, pixels: Float[Array, "height width 3"]) -> Float[Array, "M D"]:
    return vision(pixels)


def _encode_with_images(
    tokenizer: Tokenizer, prompt: str, images: int, config: SigLIPConfig
) -> list[int]:
    """Ids of a prompt, of an image the one that stands for it. Nothing else in it is special."""
    if IMAGE not in prompt:
        prompt = IMAGE * images + prompt
    first, *others = prompt.split(IMAGE)
    if len(others) != images:
        raise ValueError(
            f"The prompt has {IMAGE} {len(others)} times, and {images} image(s) were given; write "
            "one for each, or none, then they are before the text."
        )
    if not prompt:
        raise ValueError("A prompt is empty; the model needs at least one character to go on from.")
    ids = tokenizer.encode(first)
    for text in others:
        ids += [config.start, *(tokenizer.encode(text, bos=False) if text else [])]
    return ids


def _padded(rows: Sequence[Sequence[int]]) -> Int[np.ndarray, "B L"]:
    longest = max(map(len, rows))
    return np.array([[*row, *repeat(-1, longest - len(row))] for row in rows], np.int32)


def _check_one(prompt: object) -> None:
    if not isinstance(prompt, str):
        raise TypeError(f"`prompt` must be one str here, got {shortened(prompt)}.")


def _listed(prompts: Sequence[str]) -> list[str]:
    listed: list[Any] = list(prompts) if isinstance(prompts, Iterable) else [prompts]
    if not all(isinstance(prompt, str) for prompt in listed):
        raise TypeError(
            f"`prompt` must be a str or a list of str, got {shortened(prompts)}; ids go to "
            "equigemma.sampling.generate."
        )
    return listed


def _options(
    model: Transformer,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    temperature: float,
    sampler: Any,
    seed: int,
    stop_tokens: Iterable[int] | None,
) -> dict:
    """What `sampling.generate` and `sampling.stream` take alike."""
    if stop_tokens is None:
        # A tokenizer may have more ids than the model, which are never generated.
        stop_tokens = [index for index in tokenizer.special.stop if index < model.config.vocab]
    if sampler is not None and temperature != 0:
        raise ValueError(
            f"temperature={temperature} and a sampler were given; put the temperature into the "
            f"sampler: sampling.make_sampler(temperature={temperature}, ...)."
        )
    seed = as_integer("seed", seed)
    if sampler is None:
        sampler = sampling.make_sampler(temperature=temperature)
    return {
        "max_new_tokens": max_new_tokens,
        "sampler": sampler,
        "stop_tokens": stop_tokens,
        # Where nothing is drawn, not even the programs that make a key are compiled.
        "key": None if isinstance(sampler, sampling.Greedy) else jax.random.key(seed),
    }


def _detokenize(
    tokenizer: Tokenizer, steps: Iterator[np.ndarray], stops: tuple[str, ...]
) -> Iterator[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, stops)
    for token in steps:
        yield detokenizer.push(int(token))
        if detokenizer.stopped:
            return
    if rest := detokenizer.finish():
        yield rest


def _detokenize_all(
    tokenizer: Tokenizer, steps: Iterator[np.ndarray], stops: tuple[str, ...], count: int
) -> list[str]:
    spellers = [IncrementalDetokenizer(tokenizer, stops) for _ in range(count)]
    texts = [""] * count
    for tokens in steps:
        row = tokens.reshape(-1).tolist()
        texts = [
            text + detokenizer.push(token)
            for text, detokenizer, token in zip(texts, spellers, row, strict=True)
        ]
        if all(
            detokenizer.stopped or token < 0
            for detokenizer, token in zip(spellers, row, strict=True)
        ):
            break
    return [text + detokenizer.finish() for text, detokenizer in zip(texts, spellers, strict=True)]
