"""Messages of a conversation, as plain data. Their JSON is in `_json.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from equigemma.images import Image, Picture, as_list
from equigemma.text import IMAGE


@dataclass(frozen=True)
class System:
    """The system prompt."""

    text: str
    role: Literal["system", "developer"] = field(default="system", kw_only=True)
    """How a chat template is told of it; some know a developer besides."""
    name: str | None = field(default=None, kw_only=True)
    as_parts: bool = field(default=False, kw_only=True)
    """As in `User`."""

    def __post_init__(self):
        _check(self, text=str)
        if self.role not in ("system", "developer"):
            raise ValueError(
                f"`role` of a System must be system or developer, got {self.role!r:.60}."
            )


@dataclass(frozen=True)
class User:
    """A user message, with its images.

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
    name: str | None = field(default=None, kw_only=True)
    """Who says it, if that matters; for chat templates that write it."""
    as_parts: bool = field(default=False, kw_only=True)
    """Chat templates get the content as a list of parts, as they do where there are images. Some
    know no other content, and some treat it differently."""

    def __post_init__(self):
        _check(self, text=str)
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
    id: str | None = field(default=None, kw_only=True)
    """By which a `ToolResult` refers to it."""

    def __post_init__(self):
        _check(self, name=str, arguments=Mapping)


@dataclass(frozen=True)
class Assistant:
    """An answer: its text, what the model thought before, and the functions that it calls."""

    text: str
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str | None = field(default=None, kw_only=True)
    as_parts: bool = field(default=False, kw_only=True)
    """As in `User`."""

    def __post_init__(self):
        _check(self, text=str, thinking=str, calls=Sequence)
        object.__setattr__(self, "calls", tuple(self.calls))
        for call in self.calls:
            if not isinstance(call, ToolCall):
                raise TypeError(f"`calls` of an Assistant must be ToolCall, got {call!r:.60}.")


@dataclass(frozen=True)
class ToolResult:
    """The result of a tool call: a JSON value.

    `name` may be empty where the call can be told from `tool_call_id`, or from the order: the
    results of several calls come in the order of the calls.
    """

    name: str
    value: Any
    tool_call_id: str | None = field(default=None, kw_only=True)

    def __post_init__(self):
        _check(self, name=str)


Message = System | User | Assistant | ToolResult


def check_order(messages: Sequence[Message]) -> None:
    """Refuses what is no conversation that a model could have had.

    **Arguments:** `messages`: a conversation from its beginning.

    **Raises:** `ValueError`, with the number of the message, counted from 1.
    """
    allowed: tuple[type, ...] = (System, User)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, allowed):
            names = " or ".join(map(_with_article, allowed))
            raise ValueError(
                f"Message {number} must be {names}, got {_kind(message)}. After at most one "
                "System, User and Assistant take turns; the ToolResult of each call comes before "
                "the next Assistant."
            )
        match message:
            case System():
                allowed = (User,)
            case User():
                allowed = (Assistant,)
            case Assistant(calls=()):
                allowed = (User,)
            case Assistant():
                allowed = (ToolResult, User)
            case ToolResult():
                allowed = (ToolResult, Assistant, User)
    if not any(isinstance(message, User) for message in messages):
        raise ValueError("A conversation needs at least one message of a User.")


def check_continued(messages: Sequence[Message]) -> None:
    """Refuses a conversation whose last message the model cannot go on with.

    **Raises:** `ValueError`.
    """
    last = messages[-1] if messages else None
    if not isinstance(last, Assistant) or last.calls:
        raise ValueError(
            "With continue_final_message the last message must be an Assistant without calls, "
            f"which the model continues, got {'none' if last is None else _kind(last)}."
        )


def with_names(messages: Sequence[Message]) -> list[Message]:
    """The messages with the name of the function in every `ToolResult`.

    **Raises:** `ValueError` if a result without a name belongs to no call.
    """
    named: list[Message] = []
    calls: list[ToolCall] = []
    for number, message in enumerate(messages, start=1):
        if isinstance(message, Assistant):
            calls = list(message.calls)
        if not isinstance(message, ToolResult):
            named.append(message)
            continue
        # By its id, by its name, or else the first call that has no result yet.
        asked = message.tool_call_id
        found = [call for call in calls if asked is not None and call.id == asked]
        found = found or [call for call in calls if message.name == call.name]
        found = found or ([] if message.name or asked is not None else calls[:1])
        if found:
            calls.remove(found[0])
        if not found and not message.name:
            which = "is left without a result" if asked is None else f"has the id {asked!r}"
            raise ValueError(
                f"Message {number} is a ToolResult without a name, and no call before it {which}: "
                "name the function in it."
            )
        named.append(message if message.name else replace(message, name=found[0].name))
    return named


def _check(message: Any, **kinds: type) -> None:
    """Refuses fields of other types.

    **Raises:** `TypeError`.
    """
    for name, kind in kinds.items():
        value = getattr(message, name)
        if not isinstance(value, kind):
            raise TypeError(
                f"`{name}` of {_with_article(type(message))} must be a {kind.__name__}, got "
                f"{value!r:.60}."
            )


def _kind(message: Message) -> str:
    calls = " with calls" if isinstance(message, Assistant) and message.calls else ""
    return _with_article(type(message)) + calls


def _with_article(kind: type) -> str:
    return f"{'an' if kind is Assistant else 'a'} {kind.__name__}"
