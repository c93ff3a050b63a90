"""What is said in a conversation: plain data, and its form in JSON, not how it is spelled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class System:
    """What the model is told about its task, before anything else."""

    text: str


@dataclass(frozen=True)
class User:
    """What a person says."""

    text: str


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
    """The message as most programs write it: a role, `content`, and what else it has."""
    match message:
        case System(text):
            return {"role": "system", "content": text}
        case User(text):
            return {"role": "user", "content": text}
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
        case {"role": "tool", "name": str(name), "content": value, **rest} if not rest:
            return ToolResult(name, value)
        case {"role": "assistant", "content": str(text), **rest} if rest.keys() <= _PARTS:
            thinking, calls = rest.get("reasoning_content", ""), rest.get("tool_calls", [])
            if isinstance(thinking, str) and isinstance(calls, list):
                return Model(text, thinking, tuple(map(_call_from_json, calls)))
    raise ValueError(
        f"A message is an object with the role system, user, assistant or tool and its content as "
        f"text, got {_shorten(entry)}."
    )


_PARTS = {"reasoning_content", "tool_calls"}


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
