"""Messages as JSON, as OpenAI's interface, `transformers` and `datasets` write them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from equigemma.chat._messages import Assistant, Message, System, ToolCall, ToolResult, User
from equigemma.images import Picture
from equigemma.text import IMAGE


_KEYS = {
    "system": {"role", "content", "name"},
    "developer": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
# The first is the name that chat templates know.
_THINKING = ("reasoning_content", "reasoning", "thinking")


def to_json(message: Message) -> dict[str, Any]:
    """The message as most programs write it: a role, `content`, and what else it has.

    **Arguments:** `message`: a `System`, `User`, `Assistant` or `ToolResult`.

    **Returns:** a dictionary with `role`, `content` and the like; arguments of calls and values of
    results are put into it as they are.

    **Raises:** `ValueError` for an image that is in no file.
    """
    match message:
        case System(text):
            entry: dict[str, Any] = {"role": message.role, "content": _content(message, text)}
        case User(text, images):
            content = _with_images(text, images) if images else _content(message, text)
            entry = {"role": "user", "content": content}
        case ToolResult(name, value):
            entry = {"role": "tool"}
            entry |= {"name": name} if name else {}
            entry |= {} if message.tool_call_id is None else {"tool_call_id": message.tool_call_id}
            return entry | {"content": value}
        case Assistant(text, thinking, calls):
            entry = {"role": "assistant", "content": _content(message, text)}
            if thinking:
                entry["reasoning_content"] = thinking
            if calls:
                entry["tool_calls"] = list(map(_call_to_json, calls))
    return entry if message.name is None else entry | {"name": message.name}


def from_json(entry: Any) -> Message:
    """The message that `to_json` wrote, or another program in the same way.

    Keys that are null count as missing, as `datasets` fills tables up with them; the `content` of
    an answer may be missing altogether. Content may be a list of parts, of which neighbouring texts
    become one. Arguments of a call may be JSON as text: they are read, as `transformers` asks for.

    **Arguments:** `entry`: a dictionary with a `role`, as `json.loads` gives it.

    **Returns:** a `System`, `User`, `Assistant` or `ToolResult`.

    **Raises:** `ValueError` if it is no such message, or has a part that is not known.
    """
    entry = _without_nulls(entry)
    role = entry.get("role") if isinstance(entry, dict) else None
    if not isinstance(role, str) or role not in _KEYS:
        raise _no_message(entry)
    thinking = [key for key in _THINKING if key in entry] if role == "assistant" else []
    # OpenAI's own answers have an empty list of these.
    empty = ["annotations"] if entry.get("annotations") == [] else []
    unknown = entry.keys() - _KEYS[role] - {*thinking, *empty}
    if unknown or not isinstance(entry.get("name", ""), str):
        raise _no_message(entry, ", ".join(sorted(unknown)) or "name")
    content = entry.get("content", "" if role == "assistant" else None)
    name = entry.get("name")
    if role == "tool":
        return _result_from_json(entry, content)
    if isinstance(content, list) and content:
        text, images = _from_parts(content)
    elif isinstance(content, str):
        text, images = content, ()
    else:
        raise _no_message(entry)
    as_parts = isinstance(content, list) and not images
    if role == "user":
        return User(text, images, name=name, as_parts=as_parts)
    if images:
        raise _no_message(entry, "images, which a user shows")
    if role == "system" or role == "developer":
        return System(text, role=role, name=name, as_parts=as_parts)
    calls = entry.get("tool_calls", [])
    thought = entry[thinking[0]] if thinking else ""
    if not isinstance(thought, str) or not isinstance(calls, list):
        raise _no_message(entry)
    called = tuple(map(_call_from_json, calls))
    return Assistant(text, thought, called, name=name, as_parts=as_parts)


def parts_of(text: str, images: Sequence[Any]) -> list[dict[str, Any]]:
    """The text of a message as parts; those in the place of an image hold it under `image`."""
    first, *others = text.split(IMAGE) if images else [text]
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for image, other in zip(images, others, strict=True):
        parts += [{"type": "image", "image": image}, {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""] or parts


def _content(message: System | User | Assistant, text: str) -> str | list[dict[str, Any]]:
    return parts_of(text, ()) if message.as_parts else text


def _with_images(text: str, images: Sequence[Picture]) -> list[dict[str, str]]:
    """Text and images in their order, as `transformers` has it."""
    parts = parts_of(text, images)
    for part in parts:
        if (image := part.pop("image", None)) is not None:
            if image.path is None:
                raise ValueError(
                    "An image that is in no file cannot be written with a conversation."
                )
            part["path"] = image.path
    return parts


def _from_parts(parts: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    text, images = "", []
    for part in parts:
        match part:
            case {"type": "text", "text": str(said), **rest} if IMAGE not in said and not rest:
                text += said
            case {"type": "image", "path": image, **rest} if not rest:
                text += IMAGE
                images.append(image)
            case {"type": "image", "image": image, **rest} if not rest:
                text += IMAGE
                images.append(image)
            case {"type": "image", "url": str(url)} if url.startswith(_URLS):
                text += IMAGE
                images.append(url)
            case {"type": "image_url", "image_url": {"url": str(url)}} if url.startswith(_URLS):
                text += IMAGE
                images.append(url)
            case {"type": "image", **rest} if not rest:
                raise ValueError(
                    'A part {"type": "image"} does not say which image it is: give it a path, '
                    f'{{"type": "image", "path": ...}}, got {_shorten(part)}.'
                )
            case _:
                raise ValueError(
                    'A part of a message is {"type": "text", "text": ...}, without '
                    f'{IMAGE}, or {{"type": "image", "path": ...}}, got {_shorten(part)}.'
                )
    return text, tuple(images)


_URLS = ("data:", "http:", "https:")


def _result_from_json(entry: Mapping[str, Any], content: Any) -> ToolResult:
    called = entry.get("tool_call_id")
    if not isinstance(called, str | None):
        raise _no_message(entry, "tool_call_id")
    return ToolResult(entry.get("name", ""), content, tool_call_id=called)


def _call_to_json(call: ToolCall) -> dict[str, Any]:
    named = {} if call.id is None else {"id": call.id}
    function = {"name": call.name, "arguments": dict(call.arguments)}
    return named | {"type": "function", "function": function}


def _call_from_json(entry: Any) -> ToolCall:
    match entry:
        case {"function": {"name": str(name), **function}, **rest}:
            arguments = function.get("arguments", {})
            if isinstance(arguments, str):
                arguments = _read_arguments(name, arguments)
            called = rest.get("id")
            if isinstance(arguments, dict) and isinstance(called, str | None):
                return ToolCall(name, arguments, id=called)
    raise ValueError(
        f"A tool call is an object with a function, of which it has the name and the arguments, "
        f"got {_shorten(entry)}."
    )


def _read_arguments(name: str, text: str) -> Any:
    try:
        # Of a function without any, OpenAI writes nothing at all.
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"The arguments of the call of {name} are text that is not JSON: {_shorten(text)}."
        ) from error


def _without_nulls(value: Any) -> Any:
    """What JSON has, without the keys of messages, parts and calls that are null.

    What tools take and return stays as it is: there null is a value.
    """
    match value:
        case dict():
            return {
                key: item if key == "arguments" or _is_value(value, key) else _without_nulls(item)
                for key, item in value.items()
                if item is not None
            }
        case list():
            return list(map(_without_nulls, value))
    return value


def _is_value(entry: Mapping[str, Any], key: str) -> bool:
    return key == "content" and entry.get("role") == "tool"


def _no_message(entry: Any, what: str = "") -> ValueError:
    known = f" and nothing called {what}" if what else ""
    return ValueError(
        f"A message is an object with the role system, developer, user, assistant or tool and its "
        f"content as text or a list of parts{known}, got {_shorten(entry)}."
    )


def _shorten(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) <= 80 else f"{text[:79]}…"
