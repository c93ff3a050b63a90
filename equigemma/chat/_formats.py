"""Chat formats of Gemma 1 to 3 and of Gemma 4. A file's own chat template is in `_template.py`.

**Source:** Google's pages on the prompt structure of Gemma 1 to 3 and of Gemma 4; the chat
templates that come with the instruction-tuned models, which take off white space around a text.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from equigemma.chat._markup import Part, Special, encode, special_id
from equigemma.chat._messages import (
    Assistant,
    Message,
    System,
    ToolResult,
    User,
    check_continued,
    check_order,
    with_names,
)
from equigemma.chat._notation import declaration, write
from equigemma.text import IMAGE
from equigemma.tokenizers import Tokenizer


@runtime_checkable
class Format(Protocol):
    """A way to spell a conversation."""

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        answer: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Ids of a conversation from its beginning on.

        After them the model is to answer; without `answer` they end where the last message does.
        With `continue_final_message`, as in `transformers`, the last message is the beginning of
        an answer with which the model goes on, and the ids end where its text does. What is said
        never becomes a special token. An image is the token that begins one.

        **Raises:** `ValueError` if a conversation of this kind cannot be spelled in this way.
        """
        ...


@dataclass(frozen=True)
class Gemma:
    """The turns of Gemma 1, 2 and 3, which have neither a system's turn nor tools.

    What the system says stands before the first thing that the user says.
    """

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        answer: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """See `Format.encode`."""
        check_order(messages)
        if continue_final_message:
            check_continued(messages)
        return encode(tokenizer, self._parts(messages, answer, continue_final_message))

    def _parts(self, messages: Sequence[Message], answer: bool, goes_on: bool) -> Iterator[Part]:
        yield Special("<bos>")
        before = ""
        for message in messages[: len(messages) - goes_on]:
            match message:
                case System(text):
                    before = f"{text}\n\n"
                case User():
                    yield from self._turn("user", before, *said(message))
                    before = ""
                case Assistant(text, calls=()):
                    yield from self._turn("model", text.strip())
                case _:
                    raise ValueError("Gemma 1, 2 and 3 have no way to write calls of tools.")
        if answer or goes_on:
            yield from (Special("<start_of_turn>"), "model\n")
        if goes_on:
            yield _begun(messages)

    def _turn(self, role: str, *parts: Part) -> Iterator[Part]:
        yield from (Special("<start_of_turn>"), f"{role}\n", *parts)
        yield from (Special("<end_of_turn>"), "\n")


@dataclass(frozen=True, kw_only=True)
class Gemma4:
    """The turns of Gemma 4: a system's turn, thoughts, and tools.

    Thoughts are shown to the model as long as it works on one answer: once the user speaks again,
    they are left out.
    """

    thinking: bool = False
    """Lets the model think before it answers."""
    tools: Sequence[Mapping[str, Any]] = ()
    """What the model may call: `{"type": "function", "function": {"name": ..., "description": ...,
    "parameters": a JSON schema}}`."""
    empty_thought: bool = False
    """An answer without thinking begins with an empty thought: so 12B, 26B-A4B and 31B were taught,
    E2B and E4B were not."""

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        answer: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """See `Format.encode`."""
        check_order(messages)
        if continue_final_message:
            check_continued(messages)
        return encode(tokenizer, self._parts(messages, answer, continue_final_message))

    def _parts(self, messages: Sequence[Message], answer: bool, goes_on: bool) -> Iterator[Part]:
        yield Special("<bos>")
        system = next((message.text for message in messages if isinstance(message, System)), "")
        if system or self.thinking or self.tools:
            yield from (Special("<|turn>"), "system\n")
            if self.thinking:
                yield from (Special("<|think|>"), "\n")
            yield system.strip()
            for tool in self.tools:
                yield from _enclosed("tool", declaration(tool))
            yield from _TURN_END

        users = [index for index, message in enumerate(messages) if isinstance(message, User)]
        newest = max(users, default=0)
        open_turn = False
        for index, message in enumerate(with_names(messages)[: len(messages) - goes_on]):
            match message:
                case User(images=(_, *_)):
                    raise ValueError("Gemma 4 is here a model of text: leave out the images.")
                case User(text):
                    if open_turn:
                        yield from _TURN_END
                    yield from (Special("<|turn>"), f"user\n{text.strip()}", *_TURN_END)
                    open_turn = False
                case ToolResult(name, value):
                    result = value if isinstance(value, Mapping) else {"value": value}
                    yield from _enclosed("tool_response", (f"response:{name}", *write(result)))
                case Assistant(text, thinking, calls):
                    if not open_turn:
                        yield from (Special("<|turn>"), "model\n")
                    if thinking and calls and index > newest:
                        yield from _enclosed("channel", (f"thought\n{thinking}\n",))
                    yield text.strip()
                    for call in calls:
                        notation = (f"call:{call.name}", *write(call.arguments))
                        yield from _enclosed("tool_call", notation)
                    if not calls:
                        yield from _TURN_END
                    # The results of calls, and what the model makes of them, are in the same turn.
                    open_turn = bool(calls)
        if (answer or goes_on) and not open_turn:
            yield from (Special("<|turn>"), "model\n")
        if goes_on:
            yield _begun(messages)
        elif answer and not open_turn and self.empty_thought and not self.thinking:
            yield from _enclosed("channel", ("thought\n",))


def _begun(messages: Sequence[Message]) -> str:
    """The text of the answer that the model goes on with, as it stands in history."""
    last = messages[-1]
    assert isinstance(last, Assistant)  # it was checked
    return last.text.strip()


def said(message: User) -> Iterator[Part]:
    """The parts of a message: its text, and in the place of each image the token that begins one.

    White space around the whole is taken off.
    """
    text = message.text.strip()
    first, *others = text.split(IMAGE) if message.images else [text]
    yield first
    for other in others:
        yield from (Special(IMAGE), other)


_TURN_END: tuple[Part, ...] = (Special("<turn|>"), "\n")


def _enclosed(name: str, parts: Iterable[Part]) -> Iterator[Part]:
    yield Special(f"<|{name}>")
    yield from parts
    yield Special(f"<{name}|>")


def default_format(tokenizer: Tokenizer) -> Format:
    """The way of Gemma that a vocabulary has the special tokens for.

    **Arguments:** `tokenizer`: that of the model.

    **Returns:** `Gemma4()` for a vocabulary with `<|turn>`, `Gemma()` for one with
    `<start_of_turn>`.

    **Raises:** `ValueError` if it has those of neither.
    """
    if special_id(tokenizer, "<|turn>") is not None:
        return Gemma4()
    if special_id(tokenizer, "<start_of_turn>") is not None:
        return Gemma()
    raise ValueError(
        "The vocabulary has neither <start_of_turn> nor <|turn>, so nothing says how to write a "
        "conversation for this model: pass a format."
    )


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids after which it is someone else's turn: a person's, or that of a tool.

    **Arguments:** `tokenizer`: that of the model.

    **Returns:** the tokenizer's own stop tokens and those that end a turn, each id once.
    """
    endings = (special_id(tokenizer, name) for name in ("<turn|>", "<|tool_response>"))
    return tuple(dict.fromkeys([*tokenizer.special.stop, *(i for i in endings if i is not None)]))
