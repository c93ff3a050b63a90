"""Training examples from files of texts, prompts with completions, or conversations.

Nothing here computes with JAX, so that workers may read files; batches are its arrays. A process
that is forked after JAX has computed anything hangs once it computes itself: start workers before,
or by `multiprocessing.get_context("spawn")`.
"""

import json
import os
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from equigemma import chat
from equigemma._arguments import described
from equigemma._json_records import is_records, records
from equigemma._line_errors import raise_line_errors
from equigemma._text_file import read_text
from equigemma._typing import typed
from equigemma.config import SigLIPConfig
from equigemma.tokenizers import Tokenizer
from equigemma.train import Example, check_fits


@typed
def read(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    format: Any = None,
    vision: SigLIPConfig | None = None,
    length: int | None = None,
) -> list[Example]:
    """The examples of a file.

    A file of records is JSON: an object in each line, or an array of them. Each has one of

    - `text`: trained on as a whole;
    - `prompt` and `completion`: the loss is over the completion and its end. Both are
      text, or both are lists of messages;
    - `messages`, objects with `role` and `content` as `chat.from_json` takes them: the loss
      is over answers and their ends, everything else has weight 0. The user's content is text, or
      for a model that reads images a list of `{"type": "text", "text": ...}` and `{"type": "image",
      "path": ...}`, a path from the file's folder on. An answer with `"weight": 0` is not trained
      on.

    Where there are messages there may be `tools`, of which the format must know. Other keys are not
    looked at, those that are null are as if they were not there, and blank lines are skipped. Any
    file that is not called `.jsonl`, `.ndjson` or `.json`, and that does not begin with such a
    record, is one text in UTF-8. Texts begin with the token for the beginning and end with that for
    the end of a document. Every image is read once, so that a bad one shows now; examples keep the
    paths.

    **Arguments:**

    - `path`: of the file.
    - `tokenizer`: that of the model to be trained.
    - `format`: the chat template, see `equigemma.chat`; by default as the vocabulary suggests.
    - `vision`: the config of the model's tower, `model.config.vision`; None: it reads text only.
    - `length`: of the rows to come, in which an example with images must have room.

    **Returns:** examples in the order of the file.

    **Raises:** `ValueError` naming every bad line by its number (the first ten of them), or if
    there is no text at all; `OSError` if the file cannot be read.
    """
    _check(tokenizer, format)
    path = Path(path).expanduser()
    content = read_text(path)
    of_records = path.suffix.lower() in _RECORDS or is_records(content, _KEYS)
    if not content.strip():
        raise ValueError(f"{path}: the file has no {'lines' if of_records else 'text'}.")
    if not of_records:
        return [from_text(content, tokenizer)]

    examples: list[Example] = []
    bad: list[str] = []
    for record in records(content):
        try:
            if record.error is not None:
                raise ValueError(record.error)
            found = from_record(
                record.value, tokenizer, format=format, vision=vision, folder=path.parent
            )
            for example in found:
                if vision is not None and example.images:
                    check_fits(example, vision, length)
            examples += found
        except ValueError as error:
            bad.append(f"line {record.line}: {error}")
    raise_line_errors(path, bad)
    if not examples:
        raise ValueError(f"{path}: the file has no records.")
    return examples


_RECORDS = {".jsonl", ".ndjson", ".json"}


def from_record(
    record: Any,
    tokenizer: Tokenizer,
    *,
    format: Any = None,
    vision: SigLIPConfig | None = None,
    folder: Path = Path(),
) -> list[Example]:
    """The examples of one JSON record of a kind that `read` knows; images are in `folder`.

    **Arguments:**

    - `record`: a dictionary, as `json.loads` gives it.
    - `tokenizer`, `format`, `vision`: those of `read`.
    - `folder`: where paths of images begin.

    **Returns:** usually one example; of a conversation as many as `from_messages` makes.
    """
    _check(tokenizer, format)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {_kind(record)}.")
    given = {key: value for key, value in record.items() if value is not None}
    found = [kind for kind in _KINDS if all(key in given for key in kind)]
    found = found or [kind for kind in _KINDS if kind[0] in record]
    if len(found) != 1:
        names = ", ".join(repr(key) for keys in found for key in keys) or "none of them"
        raise ValueError(
            f"expected either 'text', or 'prompt' and 'completion', or 'messages'; got {names}."
        )
    options = {"vision": vision, "folder": folder, "tools": given.get("tools")}
    match {key: given.get(key) for key in found[0]}:
        case {"text": str(text)} if text:
            return [from_text(text, tokenizer)]
        case {"prompt": str(prompt), "completion": str(completion)} if prompt and completion:
            return [from_completion(prompt, completion, tokenizer)]
        case {"prompt": [*prompt], "completion": [*completion]} if prompt and completion:
            return _from_json(prompt, completion, tokenizer, format, **options)
        case {"messages": [*messages]} if messages:
            return _from_json([], messages, tokenizer, format, **options)
    wanted = " and ".join(f"'{key}'" for key in found[0])
    kind = "a list that is not empty" if found[0] == ("messages",) else "text that is not empty"
    if len(found[0]) > 1:
        kind = f"{kind}, or both a list of messages"
    got = ", ".join(f"'{key}': {_kind(record.get(key))}" for key in found[0])
    raise ValueError(f"{wanted} must be {kind}, got {got}.")


_KINDS = (("text",), ("prompt", "completion"), ("messages",))
_KEYS = {key for kind in _KINDS for key in kind}


def _from_json(
    prompt: Sequence[Any],
    completion: Sequence[Any],
    tokenizer: Tokenizer,
    format: Any,
    *,
    vision: SigLIPConfig | None,
    folder: Path,
    tools: Any,
) -> list[Example]:
    """The examples of a conversation in JSON; the prompt has weight 0."""
    entries = [*prompt, *completion]
    weights = [_weight(entry) for entry in entries]
    messages = [_message(entry, folder) for entry in entries]
    train_on = [index for index, weight in enumerate(weights) if weight and index >= len(prompt)]
    format = _with_tools(chat.default_format(tokenizer) if format is None else format, tools)
    return from_messages(messages, tokenizer, format=format, vision=vision, train_on=train_on)


def _weight(entry: Any) -> bool:
    """Whether a message is trained on, as OpenAI's files say it."""
    weight = entry.get("weight") if isinstance(entry, dict) else None
    if weight not in (None, 0, 1):
        raise ValueError(f"the weight of a message is 0 or 1, got {weight!r}.")
    return weight != 0


def _with_tools(format: Any, tools: Any) -> Any:
    if isinstance(tools, str):
        tools = _parse(tools)
    if not tools:
        return format
    if not isinstance(tools, list):
        raise ValueError(f"'tools' must be a list of functions, got {_kind(tools)}.")
    if not isinstance(format, chat.Gemma4 | chat.Template):
        raise ValueError(
            f"there are tools, which {type(format).__name__} cannot declare: give a format that "
            f"can, such as the model's own chat.Template."
        )
    return replace(format, tools=tools)


def from_text(text: str, tokenizer: Tokenizer) -> Example:
    """A whole document, trained on from its first token to its end.

    **Arguments:**

    - `text`: the document, without special tokens.
    - `tokenizer`: that of the model to be trained.

    **Returns:** an example with weight 1 at every token.
    """
    _check(tokenizer)
    ids = [*tokenizer.encode(text), tokenizer.special.eos]
    return _example(ids, [(0, len(ids))])


def from_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> Example:
    """A prompt and its completion; the loss is over the completion and the end of the document.

    The two are encoded apart, as they are when a model continues the prompt.

    **Arguments:**

    - `prompt`: what the model is given.
    - `completion`: what it is to write after it.
    - `tokenizer`: that of the model to be trained.

    **Returns:** an example with weight 0 at the prompt's tokens, 1 at all after them.
    """
    _check(tokenizer)
    given = tokenizer.encode(prompt)
    target = [*tokenizer.encode(completion, bos=False), tokenizer.special.eos]
    return _example(given + target, [(len(given), len(given) + len(target))])


def from_messages(
    messages: Sequence[chat.Message],
    tokenizer: Tokenizer,
    *,
    format: Any = None,
    vision: SigLIPConfig | None = None,
    train_on: Container[int] | None = None,
) -> list[Example]:
    """A conversation; the loss is over the assistant's messages, each with the token that ends it.

    It is one example, unless the format writes an answer in another way once it is history: then
    each answer is an example with all that was said before it.

    **Arguments:**

    - `messages`: a conversation, with at least one message of the assistant.
    - `tokenizer`, `format`, `vision`: those of `read`.
    - `train_on`: indices of the messages whose answers are trained on; by default all are.

    **Returns:** one example, or one for each answer that is trained on.

    **Raises:** `ValueError` if the model never answers, if the format cannot write the messages, or
    for images where there is no `vision`.
    """
    _check(tokenizer, format)
    chat.check_order(messages)
    if vision is None and _images(messages):
        raise ValueError("it has images, and the model reads text only: it has no vision tower.")
    format = chat.default_format(tokenizer) if format is None else format
    answers = [
        index
        for index, message in enumerate(messages)
        if _is_answer(message) and (train_on is None or index in train_on)
    ]
    if not answers:
        raise ValueError("the conversation has no message of the assistant to train on.")
    parts = []
    for index in answers:
        before = format.encode(tokenizer, messages[:index])
        whole = format.encode(tokenizer, messages[: index + 1], answer=False)
        span = _common(before, whole), _end(tokenizer, whole)
        parts.append((whole[: span[1]], span, _images(messages[:index])))
    longest, _, images = parts[-1]
    if all(longest[: span[1]] == whole for whole, span, _ in parts):
        return [_example(longest, [span for _, span, _ in parts], images)]
    return [_example(whole, [span], images) for whole, span, images in parts]


def _check(tokenizer: Any, format: Any = None) -> None:
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"`tokenizer` must be one of equigemma.tokenizers, as from equigemma.load; got "
            f"{described(tokenizer)}."
        )
    if format is not None and (isinstance(format, str) or not hasattr(format, "encode")):
        raise TypeError(
            "`format` must be a chat format, such as chat.Gemma() or chat.Template(source); got "
            f"{described(format)}."
        )


def _message(entry: Any, folder: Path) -> chat.Message:
    """The message of a JSON object; paths of images begin at the folder."""
    match entry:
        case {"role": "user", "content": [*parts]}:
            entry = entry | {"content": [_located(part, folder) for part in parts]}
    if isinstance(entry, dict):
        entry = {key: value for key, value in entry.items() if key != "weight"}
    return chat.from_json(entry)


def _located(part: Any, folder: Path) -> Any:
    match part:
        case {"type": "image", "path": str(path)} | {"type": "image", "image": str(path)}:
            return {"type": "image", "path": str(folder / path)}
    return part


def _images(messages: Sequence[chat.Message]) -> tuple[Any, ...]:
    """The images of a conversation; those of files as paths, so that their pixels can go."""
    users = [message for message in messages if isinstance(message, chat.User)]
    return tuple(image.path or image for user in users for image in user.images)


def _is_answer(message: chat.Message) -> bool:
    return isinstance(message, chat.Assistant)


def _common(before: Sequence[int], whole: Sequence[int]) -> int:
    """How far two texts are alike."""
    pairs = zip(before, whole, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(before), len(whole)))


def _end(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """After the last token that ends an answer; what follows it nobody has to predict."""
    stops = chat.stop_tokens(tokenizer)
    return next((at for at in range(len(ids), 0, -1) if ids[at - 1] in stops), len(ids))


def _example(
    ids: Sequence[int], trained: Sequence[tuple[int, int]], images: Sequence[Any] = ()
) -> Example:
    weights = np.zeros(len(ids), np.float32)
    for start, stop in trained:
        weights[start:stop] = 1
    return Example(np.asarray(ids, np.int32), weights, images)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'tools' is text that is not JSON: {error}.") from None


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str | list) and not value:
        return "an empty text" if isinstance(value, str) else "an empty list"
    return {str: "a text", list: "a list", dict: "an object"}.get(type(value), repr(value))
