"""A conversation that keeps what the model has read of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from equigemma import sampling
from equigemma._arguments import as_integer, check_kind, described
from equigemma.chat._formats import Format, default_format, stop_tokens
from equigemma.chat._images import Read, rest, with_images
from equigemma.chat._messages import Assistant, Message, System, User
from equigemma.chat._prefix_cache import PrefixCache, restore_prefix, snapshot
from equigemma.chat._response_parser import Piece, ResponseParser
from equigemma.nn import Transformer
from equigemma.text import checked_stop_strings
from equigemma.tokenizers import Tokenizer, check_tokenizer


class Sent(NamedTuple):
    """The conversation after a message and its answer, and the text of that answer."""

    chat: "Chat"
    reply: str


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Chat:
    """A conversation with a model: a value, which every message sent makes a new one of.

    ```python
    >>> import equigemma as eg
    >>> model, tokenizer = eg.load("gemma-3-1b-it.gguf")  # doctest: +SKIP
    >>> chat = eg.Chat(model, tokenizer, system="Answer in one word.")  # doctest: +SKIP
    >>> chat, reply = chat.send("What is the capital of France?")  # doctest: +SKIP
    >>> chat, reply = chat.send("And of Spain?")  # reads the new words only  # doctest: +SKIP

    ```

    Earlier conversations stay as they are: two messages sent to one chat are two ways to go on.
    The answer to a message is that of a fresh start with all that was said, token for token; what
    the model has read already is read again only where the format writes it in another way once it
    is history. Images are said with a `User`: `chat.send(User("What is this?", ["cat.png"]))`.
    """

    model: Transformer
    tokenizer: Tokenizer
    format: Format
    messages: tuple[Message, ...]
    capacity: int
    prefix_cache: PrefixCache | None

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        format: Format | None = None,
        system: str | None = None,
        messages: Sequence[Message] = (),
        capacity: int = 4096,
        prefix_cache: PrefixCache | None = None,
    ):
        """A new conversation, or one that goes on from `messages`.

        **Arguments:**

        - `model`: any causal `Transformer`.
        - `tokenizer`: that of the model.
        - `format`: how the conversation is spelled: `Gemma()`, `Gemma4(...)`, or the model's own
          `Template(...)`. By default the way of Gemma that the vocabulary has the tokens for.
        - `system`: what the model is told before anything else; the same as a `System` as the first
          of `messages`.
        - `messages`: what has been said before, in order.
        - `capacity`: how many tokens the conversation can have, for which there is memory at once.
        - `prefix_cache`: that of an earlier chat. As much is taken from it as is of use.

        **Raises:** `ValueError` if there is no format, no room, or if `messages` begin with another
        `System`.
        """
        check_kind("model", model, Transformer, "`eg.load` gives one.")
        check_tokenizer(tokenizer)
        if isinstance(format, str) or not isinstance(format, Format | None):
            raise TypeError(
                f"`format` must be a Format such as chat.Gemma(), got {described(format)}. Leave "
                "it out to take that of the vocabulary."
            )
        capacity = as_integer("capacity", capacity)
        if capacity < 1:
            raise ValueError(
                f"A chat needs a capacity of at least one token, got capacity={capacity}."
            )
        if system is not None:
            if isinstance(system, System):
                raise TypeError("`system` must be a str; a System is the first of `messages`.")
            if messages and isinstance(messages[0], System):
                raise ValueError("There is a System among the messages: leave out `system`.")
            messages = (System(system), *messages)
        vars(self).update(
            model=model,
            tokenizer=tokenizer,
            format=default_format(tokenizer) if format is None else format,
            messages=tuple(messages),
            capacity=capacity,
            prefix_cache=prefix_cache,
        )

    def send(
        self,
        message: str | Message | Sequence[Message],
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        sampler: sampling.AbstractSampler | None = None,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        prefill: str = "",
    ) -> Sent:
        """The conversation after `message` and the model's answer, and the text of that answer.

        Thoughts and calls of tools are in `chat.messages[-1]`.

        **Arguments:**

        - `message`: what the user says, as text or with images as a `User`, or messages such as the
          `ToolResult` of each call.
        - `max_new_tokens`: the answer is cut off after so many; also where the chat has no more
          room.
        - `temperature`, `sampler`, `seed`, `stop_strings`: as in `equigemma.generate`.
        - `prefill`: how the answer begins, without white space around it. The model goes on from
          there (`continue_final_message` in `transformers`), and it is a part of the answer.

        **Raises:** `ValueError` if it is not the turn of such a message, if the format cannot
        write it, if the conversation is too long for the chat's capacity, or for images that the
        model cannot see.
        """
        turn = self.stream(
            message,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            sampler=sampler,
            seed=seed,
            stop_strings=stop_strings,
            prefill=prefill,
        )
        reply = "".join(piece.text for piece in turn if piece.kind == "text")
        return Sent(turn.chat, reply)

    def stream(
        self,
        message: str | Message | Sequence[Message],
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        sampler: sampling.AbstractSampler | None = None,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        prefill: str = "",
    ) -> "Turn":
        """The answer to `message` piece by piece, one piece for each token; before them `prefill`.

        Arguments and errors are those of `send`.
        """
        if sampler is None:
            sampler = sampling.make_sampler(temperature=temperature)
        elif temperature:
            raise ValueError(
                f"temperature={temperature} and a sampler were given; put the temperature into "
                "the sampler."
            )
        max_new_tokens = as_integer("max_new_tokens", max_new_tokens)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        stop_strings = checked_stop_strings(stop_strings)
        new = [User(message)] if isinstance(message, str) else message
        new = [new] if isinstance(new, Message) else new
        if not isinstance(new, list | tuple):
            raise TypeError(
                f"`message` must be a str, a message or a list of messages, got {message!r:.60}."
            )
        messages = (*self.messages, *new)
        if prefill := prefill.strip():
            ids = self.format.encode(
                self.tokenizer, (*messages, Assistant(prefill)), continue_final_message=True
            )
        else:
            ids = self.format.encode(self.tokenizer, messages)
        read = with_images(self.model, ids, messages)
        # The last token of an answer need not be read.
        room = self.capacity - len(read.ids) + 1
        if room < 1:
            raise ValueError(
                f"The conversation has {len(read.ids)} tokens, the chat a capacity of "
                f"{self.capacity}: begin a new one, or give it a larger capacity."
            )
        return Turn(
            self,
            messages,
            read,
            max_new_tokens=min(max_new_tokens, room),
            sampler=sampler,
            seed=seed,
            stop_strings=stop_strings,
            prefill=prefill,
        )

    def __repr__(self) -> str:
        count = len(self.messages)
        return f"Chat({count} message{'' if count == 1 else 's'}, {self.format})"


class Turn(Iterator[Piece]):
    """An answer on its way: iterate over its pieces.

    `chat` is the conversation with as much of the answer as has come, also if the iteration is
    broken off. `prompt_tokens` are those of the whole conversation before the answer, of which
    `read_tokens` had to be read.
    """

    def __init__(
        self,
        chat: Chat,
        messages: tuple[Message, ...],
        read: Read,
        *,
        max_new_tokens: int,
        sampler: sampling.AbstractSampler,
        seed: int,
        stop_strings: Sequence[str],
        prefill: str,
    ):
        self._before = chat
        self._messages = messages
        self._marks = read.marks
        self._reader = ResponseParser(chat.tokenizer, stop_strings, prefill)
        self._prefill = prefill
        self._cache, start = restore_prefix(
            chat.prefix_cache, chat.model, chat.capacity, read.marks
        )
        ids, soft_tokens = rest(chat.model, read, start)
        self._tokens = sampling.stream(
            chat.model,
            ids,
            cache=self._cache,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            stop_tokens=stop_tokens(chat.tokenizer),
            key=jax.random.key(seed),
            soft_tokens=soft_tokens,
        )
        self._new: list[int] = []
        self._ended = False
        self.prompt_tokens = len(read.ids)
        self.read_tokens = len(ids)

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """Ids of the answer so far, a stop token included."""
        return tuple(self._new)

    @property
    def chat(self) -> Chat:
        """The conversation with the answer so far; what it has read is lost if the turn goes on."""
        before = self._before
        marks = [*self._marks, *self._new]
        return Chat(
            before.model,
            before.tokenizer,
            format=before.format,
            messages=(*self._messages, self._reader.message()),
            capacity=before.capacity,
            prefix_cache=snapshot(
                before.model, before.capacity, marks, self._tokens.cache, self._cache
            ),
        )

    def __next__(self) -> Piece:
        if self._ended:
            raise StopIteration
        if self._prefill:
            piece, self._prefill = Piece(self._prefill), ""
            return piece
        index = None if self._reader.stopped else next(self._tokens, None)
        if index is None:
            self._ended = True
            piece = self._reader.finish()
            if not piece.text:
                raise StopIteration
            return piece
        self._new.append(int(index))
        return self._reader.push(int(index))
