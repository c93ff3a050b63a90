"""Parses a response token by token into text, thinking and tool calls."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from equigemma.chat._markup import special_id
from equigemma.chat._messages import Assistant, ToolCall
from equigemma.chat._notation import QUOTE, read_call
from equigemma.text import IncrementalDetokenizer
from equigemma.tokenizers import Tokenizer


class Piece(NamedTuple):
    """The text that one token adds to an answer; it may be empty."""

    text: str
    kind: Literal["text", "thinking", "call"] = "text"


class ResponseParser:
    """Parses the ids of a response.

    Tokens between `<|channel>` and `<channel|>` are thoughts, those between `<|tool_call>` and
    `<tool_call|>` a call. A vocabulary without these has answers of text alone.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), prefill: str = ""):
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._switches = {
            special_id(tokenizer, "<|channel>"): "thinking",
            special_id(tokenizer, "<|tool_call>"): "call",
            special_id(tokenizer, "<channel|>"): "text",
            special_id(tokenizer, "<tool_call|>"): "text",
        }
        self._quote = special_id(tokenizer, QUOTE.spelling)
        self._text = prefill
        self._thinking = ""
        self._calls: list[ToolCall] = []
        self._call: list[str | None] = []
        self._kind: Literal["text", "thinking", "call"] = "text"
        self._detokenizer = IncrementalDetokenizer(tokenizer, stop_strings)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was generated; thinking and calls are not searched."""
        return self._detokenizer.stopped

    def push(self, index: int) -> Piece:
        """The text that this token completes, and what it belongs to."""
        kind = self._switches.get(index)
        if kind is not None:
            piece = self.finish()
            self._kind = kind  # pyright: ignore[reportAttributeAccessIssue]
            self._detokenizer = IncrementalDetokenizer(
                self._tokenizer, self._stop_strings if kind == "text" else ()
            )
            return piece
        if self._kind == "call" and index == self._quote:
            piece = self._keep(self._detokenizer.finish())
            self._call.append(None)
            return Piece(piece.text + '"', "call")
        return self._keep(self._detokenizer.push(index))

    def finish(self) -> Piece:
        """Flushes the held-back text, when no more tokens come."""
        piece = self._keep(self._detokenizer.finish())
        if self._call:
            call = read_call(self._call)
            if call is None:
                # What the model meant as a call, but is none, is for a person to see.
                self._text += "".join('"' if part is None else part for part in self._call)
            else:
                self._calls.append(call)
            self._call = []
        return piece

    def message(self) -> Assistant:
        """The answer as far as it has come."""
        thinking = self._thinking.removeprefix("thought\n").removesuffix("\n")
        return Assistant(self._text, thinking, tuple(self._calls))

    def _keep(self, text: str) -> Piece:
        match self._kind:
            case "text":
                self._text += text
            case "thinking":
                self._thinking += text
            case "call":
                self._call.append(text)
        return Piece(text, self._kind)
