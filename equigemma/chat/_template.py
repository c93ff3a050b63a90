"""The chat template that a model's file brings along, in the language Jinja.

A template puts texts between special tokens, and gives back one string. In that string nobody could
tell a special token of the template from one that somebody has spelled out in a message. So before
the template runs, texts are marked where a special token could begin in them, with a character that
none of them has; what is marked afterwards is text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from equigemma.chat._markup import Special, encode, split
from equigemma.chat._messages import Message, ToolResult, User, check_order, to_json
from equigemma.text import IMAGE
from equigemma.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """A chat template as `transformers` runs it, in a sandbox with bounds on time and memory."""

    source: str
    """The template itself, in Jinja."""
    thinking: bool = field(default=False, kw_only=True)
    """Given to the template as `enable_thinking`."""
    tools: Sequence[Mapping[str, Any]] = field(default=(), kw_only=True)
    """What the model may call, as in `Gemma4`; given to the template as `tools`."""
    _code: CodeType = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        """Reads the template.

        **Raises:** `ValueError` if it is none, or uses what chat templates have no use for;
        `ImportError` if `jinja2` is not installed.
        """
        try:
            from jinja2 import TemplateError, TemplateSyntaxError

            from equigemma.chat import _sandbox
        except ImportError as error:
            raise ImportError(
                "The chat templates of model files need the package jinja2, which is not "
                'installed: pip install "equigemma[chat]".'
            ) from error
        try:
            code = _sandbox.compile_template(self.source)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"The chat template is refused: in line {error.lineno}: {error.message}"
            ) from error
        except TemplateError as error:
            raise ValueError(f"The chat template is refused: {_reason(error)}.") from error
        object.__setattr__(self, "_code", code)

    def __repr__(self) -> str:
        return f"Template({len(self.source)} characters)"

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, answer: bool = True
    ) -> list[int]:
        """See `Format.encode`.

        **Raises:** `ValueError` also if the template fails, or does not want such a conversation.
        """
        check_order(messages)
        entries = _entries(messages)
        shown = [message.images for message in messages if isinstance(message, User)]
        mark = _unused([self.source, *_texts(entries), *_texts(self.tools)])
        text = self._render(
            {
                "messages": list(_marked_messages(entries, shown, mark)),
                "tools": [_marked(tool, mark) for tool in self.tools] or None,
                "enable_thinking": self.thinking,
                "add_generation_prompt": answer,
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
            }
        )
        parts = split(tokenizer, text)
        ids = encode(
            tokenizer,
            (part if isinstance(part, Special) else part.replace(mark, "") for part in parts),
        )
        # Some templates leave it to the program that runs them.
        begin = tokenizer.special.bos
        return ids if ids[:1] == [begin] else [begin, *ids]

    def _render(self, variables: dict[str, Any]) -> str:
        from jinja2 import TemplateError

        from equigemma.chat import _sandbox

        # Honest templates read each text a few times, and for each message look at all others.
        size, count = sum(map(len, _texts(variables))), len(variables["messages"])
        budget = (1 << 24) + (1 << 8) * size + (1 << 10) * count**2
        try:
            return _sandbox.run(self._code, variables, budget=budget)
        except TemplateError as error:
            raise ValueError(
                f"The chat template stops at this conversation: {_reason(error)}."
            ) from error


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__


def _entries(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: what tools returned is with the calls, as Gemma has it."""
    entries: list[dict[str, Any]] = []
    for message in messages:
        if isinstance(message, ToolResult):
            results = entries[-1].setdefault("tool_responses", [])
            results.append({"name": message.name, "response": message.value})
        elif isinstance(message, User):
            entries.append({"role": "user", "content": message.text})
        else:
            entries.append(to_json(message))
    return entries


def _texts(value: Any) -> Iterator[str]:
    """Every text in what JSON has, names included."""
    match value:
        case str():
            yield value
        case Mapping():
            for key, item in value.items():
                yield key
                yield from _texts(item)
        case list() | tuple():
            for item in value:
                yield from _texts(item)


def _unused(texts: Iterable[str]) -> str:
    """A character that is in none of the texts; Unicode sets some aside that no text has."""
    used = set().union(*texts)
    codes = (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0x10FFFE))
    return next(char for char in map(chr, codes) if char not in used)


def _marked(value: Any, mark: str) -> Any:
    """A value with a mark after every character with which a special token can begin."""
    match value:
        case str():
            return value.replace("<", f"<{mark}").replace("[", f"[{mark}")
        case Mapping():
            return {_marked(key, mark): _marked(item, mark) for key, item in value.items()}
        case list() | tuple():
            return [_marked(item, mark) for item in value]
    return value


def _marked_messages(
    entries: Sequence[Mapping[str, Any]], shown: Sequence[Sequence[Any]], mark: str
) -> Iterator[dict[str, Any]]:
    """Messages whose texts cannot become special tokens, but for those in the place of images."""
    images = iter(shown)
    for entry in entries:
        marked = _marked_message(entry, mark)
        if entry["role"] == "user" and next(images):
            marked["content"] = marked["content"].replace(_marked(IMAGE, mark), IMAGE)
        yield marked


def _marked_message(entry: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """The same, and the content cannot complete a special token that the template has begun.

    White space in front stays in front: templates take it off.
    """
    marked = _marked(entry, mark)
    content = marked["content"]
    text = content.lstrip()
    if text:
        marked["content"] = content[: len(content) - len(text)] + mark + text
    return marked
