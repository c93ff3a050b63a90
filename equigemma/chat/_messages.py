"""What is said in a conversation: plain data, and its form in JSON, not how it is spelled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equigemma.images import Image, Picture, as_list
from equigemma.text import IMAGE


@dataclass(frozen=True)
class System:
    """What the model is told about its task, before anything else."""

    text: str


@dataclass(frozen=True)
class User:
    """What a person says, and the images that it is about.

    ```python
    >>> import numpy as np
    >>> from equigemma.chat import User
    >>> black = np.zeros((5, 7, 3), np.uint8)
    >>> User("What is this?", [black]).text
    '<start_of_image>What is this?'

    ```

    Each `<start_of_image>` in the text is one of the images; if it has none, they are before the
    text. Without images it is text like any other.

    **Raises:** `ValueError` if the text has another number of them, or for what is no image.
    """

    text: str
    images: Sequence[Image] = ()
    """What `equigemma.generate` takes for images; it becomes a tuple of `equigemma.images.Picture`.
    """

    def __post_init__(self):
        images, text = tuple(map(Picture, as_list(self.images))), self.text
        places = text.count(IMAGE)
        if images and places not in (0, len(images)):
            raise ValueError(
                f"The message has {IMAGE} {places} times, and {len(images)} image(s) were given; "
                "write one for each, or none, then they are before the text."
            )
        object.__setattr__(self, "images", images)
        if not places:
            object.__setattr__(self, "text", IMAGE * len(images) + text)


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants to have called; `arguments` are values that JSON has."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """An answer: its text, what the model thought before, and the functions that it calls."""

    text: str
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class ToolResult:
    """What a called function returned: a value that JSON has."""

    name: str
    value: Any


Message = System | User | Model | ToolResult


def check_order(messages: Sequence[Message]) -> None:
    """Refuses what is no conversation that a model could have had.

    **Raises:** `ValueError`, with the number of the message, counted from 1.
    """
    allowed: tuple[type, ...] = (System, User)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, allowed):
            names = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(
                f"Message {number} must be a {names}, got a {type(message).__name__}. After at "
                f"most one System, User and Model take turns; the ToolResult of each call comes "
                f"before the next Model."
            )
        match message:
            case System():
                allowed = (User,)
            case User():
                allowed = (Model,)
            case Model(calls=()):
                allowed = (User,)
            case Model():
                allowed = (ToolResult, User)
            case ToolResult():
                allowed = (ToolResult, Model, User)
    if not any(isinstance(message, User) for message in messages):
        raise ValueError("A conversation needs at least one message of a User.")


def to_json(message: Message) -> dict[str, Any]:
    """The message as most programs write it: a role, `content`, and what else it has.

    **Raises:** `ValueError` for an image that is in no file.
    """
    match message:
        case System(text):
            return {"role": "system", "content": text}
        case User(text, images):
            content = _parts(text, images) if images else text
            return {"role": "user", "content": content}
        case ToolResult(name, value):
            return {"role": "tool", "name": name, "content": value}
        case Model(text, thinking, calls):
            entry: dict[str, Any] = {"role": "assistant", "content": text}
            if thinking:
                entry["reasoning_content"] = thinking
            if calls:
                entry["tool_calls"] = [
                    {
                        "type": "function",
                        "function": {"name": call.name, "arguments": dict(call.arguments)},
                    }
                    for call in calls
                ]
            return entry


def from_json(entry: Any) -> Message:
    """The message that `to_json` wrote, or another program in the same way.

    **Raises:** `ValueError` if it is no such message, or has a part that is not known.
    """
    match entry:
        case {"role": "system", "content": str(text), **rest} if not rest:
            return System(text)
        case {"role": "user", "content": str(text), **rest} if not rest:
            return User(text)
        case {"role": "user", "content": [*parts], **rest} if parts and not rest:
            return _user_from_json(parts)
        case {"role": "tool", "name": str(name), "content": value, **rest} if not rest:
            return ToolResult(name, value)
        case {"role": "assistant", "content": str(text), **rest} if rest.keys() <= _OF_ANSWERS:
            thinking, calls = rest.get("reasoning_content", ""), rest.get("tool_calls", [])
            if isinstance(thinking, str) and isinstance(calls, list):
                return Model(text, thinking, tuple(map(_call_from_json, calls)))
    raise ValueError(
        f"A message is an object with the role system, user, assistant or tool and its content as "
        f"text, got {_shorten(entry)}."
    )


_OF_ANSWERS = {"reasoning_content", "tool_calls"}


def _parts(text: str, images: Sequence[Picture]) -> list[dict[str, str]]:
    """Text and images in their order, as `transformers` has it."""
    first, *others = text.split(IMAGE)
    parts = [{"type": "text", "text": first}]
    for image, other in zip(images, others, strict=True):
        if image.path is None:
            raise ValueError("An image that is in no file cannot be written with a conversation.")
        parts += [{"type": "image", "path": image.path}, {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""]


def _user_from_json(parts: Sequence[Any]) -> User:
    text, images = "", []
    for part in parts:
        match part:
            case {"type": "text", "text": str(said)} if IMAGE not in said:
                text += said
            case {"type": "image", "path": str(path)}:
                text += IMAGE
                images.append(path)
            case _:
                raise ValueError(
                    'A part of a message is {"type": "text", "text": ...}, without '
                    f'{IMAGE}, or {{"type": "image", "path": ...}}, got {_shorten(part)}.'
                )
    return User(text, tuple(images))


def _call_from_json(entry: Any) -> ToolCall:
    match entry:
        case {"function": {"name": str(name), "arguments": dict(arguments)}}:
            return ToolCall(name, arguments)
    raise ValueError(
        f"A tool call is an object with a function, of which it has the name and the arguments, "
        f"got {_shorten(entry)}."
    )


def _shorten(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) <= 80 else f"{text[:79]}…"
