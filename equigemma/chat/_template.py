"""The chat template that a model's file brings along, in the language Jinja."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

from equigemma.chat._json import parts_of, to_json
from equigemma.chat._markup import special_id
from equigemma.chat._messages import (
    Assistant,
    Message,
    ToolResult,
    User,
    check_continued,
    check_order,
    with_names,
)
from equigemma.chat._provenance import OWN, SAID, Text, said
from equigemma.chat._rendering import Rendering, reason
from equigemma.chat._tools import tool_schema
from equigemma.text import IMAGE
from equigemma.tokenizers import Tokenizer


# The same text as in transformers: a template may look at the length of what it stands behind.
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True)
class Template:
    """A chat template as `transformers` runs it: the ids are those of `apply_chat_template`.

    One thing differs: what is said in a conversation, in descriptions of tools and in `documents`
    never becomes a special token, nor part of one. In `transformers` it does, unless it is asked
    not to.

    The template comes from a file that need not be trusted. It runs in Jinja's sandbox, which keeps
    it away from Python and from files, and with bounds on its work: rounds of loops, calls, the
    characters that it writes, and 10 seconds of processor time. What remains is that a template
    decides what the model reads, and whatever a hole in Jinja's sandbox would let through.
    """

    source: str
    """The template itself, in Jinja."""
    thinking: bool | None = field(default=None, kw_only=True)
    """Given to the template as `enable_thinking`; None: it is left to the template."""
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] = field(default=(), kw_only=True)
    """What the model may call, as in `Gemma4`; given to the template as `tools`."""
    documents: Sequence[Mapping[str, Any]] | None = field(default=None, kw_only=True)
    """What the model may look up, each with a `title` and a `text`."""
    variables: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """Others that a template knows, such as `{"reasoning_effort": "high"}`."""
    _programs: tuple[CodeType, CodeType] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        """Reads the template.

        **Raises:** `ValueError` if it is none, or is too long; `ImportError` if `jinja2` is not
        installed.
        """
        if not isinstance(self.source, str):
            raise TypeError(
                f"`source` must be a chat template as a str, got {self.source!r:.60}; a model "
                "without one has None for it."
            )
        try:
            from jinja2 import TemplateError, TemplateSyntaxError

            from equigemma.chat import _program
        except ImportError as error:
            raise ImportError(
                "The chat templates of model files need the package jinja2, which is not "
                'installed: pip install "equigemma[chat]".'
            ) from error
        try:
            programs = tuple(
                _program.compile_template(self.source, marked=marked) for marked in (False, True)
            )
        except TemplateSyntaxError as error:
            raise ValueError(
                f"The chat template is refused: in line {error.lineno}: {error.message}"
            ) from error
        except TemplateError as error:
            raise ValueError(f"The chat template is refused: {reason(error)}.") from error
        if not all(isinstance(document, Mapping) for document in self.documents or ()):
            raise ValueError("Each of the `documents` must be an object with a title and a text.")
        object.__setattr__(self, "_programs", programs)
        object.__setattr__(self, "tools", tuple(map(tool_schema, self.tools)))

    def __repr__(self) -> str:
        return f"Template({len(self.source)} characters)"

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        answer: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """See `Format.encode`.

        **Raises:** `ValueError` also if the template fails, if it does not want such a
        conversation, or if it cannot be told whether a special token is its own.
        """
        check_order(messages)
        if continue_final_message:
            check_continued(messages)
            messages = [*messages[:-1], _with_tag(messages[-1])]
        answer = answer and not continue_final_message
        images = sum(len(message.images) for message in messages if isinstance(message, User))
        ids = None
        try:
            ids = self._encode(tokenizer, messages, answer, continue_final_message, as_parts=True)
        except ValueError:
            if not images:
                raise
        start = special_id(tokenizer, IMAGE)
        if ids is None or images and sum(index == start for index in ids) != images:
            # The template knows no parts: the text itself has the tokens that stand for images.
            ids = self._encode(tokenizer, messages, answer, continue_final_message, as_parts=False)
        begin = tokenizer.special.bos
        return [begin, *ids] if tokenizer.special.chat_bos and ids[:1] != [begin] else ids

    def _encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        answer: bool,
        goes_on: bool,
        *,
        as_parts: bool,
    ) -> list[int]:
        data: dict[str, Any] = {
            "tools": list(self.tools) or None,
            "documents": self.documents,
            "add_generation_prompt": answer,
        }
        data |= {} if self.thinking is None else {"enable_thinking": self.thinking}
        data = said(_plain(data | dict(self.variables)))
        entries = _plain(_entries(messages, self.source, as_parts))
        data["messages"] = [_marked(entry, not as_parts) for entry in entries]
        names = tokenizer.special.names.items()
        own = {f"{name}_token": Text(spelling, OWN) for name, spelling in names}
        rendering = Rendering(self._programs, own | data)
        text = rendering.text()
        return rendering.ids(tokenizer, _cut(text, messages[-1]) if goes_on else text)


def _entries(messages: Sequence[Message], source: str, as_parts: bool) -> list[dict[str, Any]]:
    """Messages as `transformers` gives them to a template.

    Some templates of Gemma 4 want what tools returned with the calls. Those that know the role of a
    tool as well go by ids, and without ids take the last call for that of every result.
    """
    knows_tools = "'tool'" in source or '"tool"' in source
    has_ids = all(m.tool_call_id is not None for m in messages if isinstance(m, ToolResult))
    with_calls = "tool_responses" in source and not (knows_tools and has_ids)
    entries: list[dict[str, Any]] = []
    for message in with_names(messages) if with_calls else messages:
        if isinstance(message, ToolResult) and with_calls:
            results = entries[-1].setdefault("tool_responses", [])
            results.append({"name": message.name, "response": message.value})
            continue
        if isinstance(message, User) and message.images:
            # What the images are, no template looks at.
            parts = parts_of(message.text, ["<image>"] * len(message.images))
            entry: dict[str, Any] = {"role": "user", "content": parts if as_parts else message.text}
        else:
            entry = to_json(message)
        if "reasoning_content" in entry:
            entry["thinking"] = entry["reasoning_content"]
        entries.append({key: value for key, value in entry.items() if value is not None})
    return entries


def _with_tag(message: Message) -> Message:
    assert isinstance(message, Assistant)  # it was checked
    return replace(message, text=message.text + _TAG)


def _cut(text: Text, last: Message) -> Text:
    """What comes before the tag, without the white space that the template has taken off there."""
    tag = _TAG.strip()
    begun = last.text.removesuffix(_TAG).strip()  # pyright: ignore[reportAttributeAccessIssue]
    at = text.rfind(tag)
    if at < 0 or begun not in text:
        raise ValueError(
            "The chat template does not write the last message as it is, so that the model cannot "
            "go on with it: leave out continue_final_message."
        )
    return text[:at] if text[at : at + len(_TAG)] == _TAG else text[:at].rstrip()


def _plain(value: Any) -> Any:
    """What JSON has of a value: a template gets no other objects, whose methods it could call."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return str(value)
        case Mapping():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return list(map(_plain, value))
    raise ValueError(f"A chat template takes values that JSON has, got a {type(value).__name__}.")


def _marked(entry: Mapping[str, Any], has_images: bool) -> dict[Text, Any]:
    """A message in which all but what we have written ourselves is marked as said."""
    marked = {Text(key, OWN): said(value) for key, value in entry.items()}
    marked[Text("role", OWN)] = Text(entry["role"], OWN)
    content = entry.get("content")
    if isinstance(content, list):
        kinds = [{Text("type", OWN): Text(part["type"], OWN)} for part in content]
        parts = zip(kinds, content, strict=True)
        marked[Text("content", OWN)] = [
            kind | {Text(k, OWN): said(v) for k, v in part.items() if k != "type"}
            for kind, part in parts
        ]
    elif has_images and isinstance(content, str) and entry["role"] == "user":
        pieces = [Text(piece, SAID) for piece in content.split(IMAGE)]
        marked[Text("content", OWN)] = Text(IMAGE, OWN).join(pieces)
    return marked
