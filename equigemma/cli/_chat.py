"""`equigemma chat`: a conversation in the terminal, or one read from standard input."""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from equigemma.cli import _options
from equigemma.cli._prompt_lines import lines
from equigemma.cli._sampling import (
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    Sampling,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from equigemma.cli._shared import (
    DTYPE_HELP,
    WEIGHTS_HELP,
    DTypeName,
    WeightsName,
    keep_compiled_programs,
    load_prepared,
    pictures,
)


FormatName = Literal["auto", "file", "gemma", "gemma4"]

HELP = """/image FILE  show an image with the next message
/reset       forget what was said
/save FILE   write the conversation to a file
/load FILE   go on with a conversation from a file
/help        this text
Ctrl-C stops an answer and keeps what there is of it, Ctrl-D ends."""


def chat(
    model: Annotated[
        str, typer.Argument(help="Name of a model, a .gguf file, or a folder.")
    ] = "gemma3-270m",
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", "-i", help="Image for the first message; may be given several times."
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    seed: Seed = 0,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print each answer as a JSON object, a message as OpenAI's."),
    ] = False,
    dtype: Annotated[DTypeName, typer.Option(help=DTYPE_HELP)] = "bfloat16",
    bits: Annotated[WeightsName, typer.Option("--weights", "-w", help=WEIGHTS_HELP)] = "full",
    capacity: Annotated[
        int, typer.Option(help="KV cache capacity: maximum length of a conversation in tokens.")
    ] = 4096,
    thinking: Annotated[bool, typer.Option("--thinking", help="Think before answering.")] = False,
    format: Annotated[
        FormatName,
        typer.Option(
            "--format", "-f", help="Chat template; auto is that of the model's files, if any."
        ),
    ] = "auto",
) -> None:
    """Talk with a model.

    Each line is a message. Answers go to standard output, everything else to standard error.
    """
    sampling = Sampling(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop or (), seed
    )
    sampling.check()
    _options.at_least("capacity", capacity, 1)
    _options.text("--system", system or "")
    images = pictures(image, model)
    keep_compiled_programs()
    import equigemma as eg

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    read_as = partial(load_prepared, model, dtype, bits)
    weights, tokenizer, chosen = _open(model, read_as, format, thinking, console)
    start = eg.Chat(weights, tokenizer, format=chosen, system=system, capacity=capacity)
    session = _Session(start, model, console, sampling.arguments, seed, images or (), as_json)
    with lines(console) as typed:
        for line in typed:
            session.take(line)


def _open(
    model: str,
    read_as: Callable[[], tuple[Any, Any]],
    format: FormatName,
    thinking: bool,
    console: Console,
) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and how conversations are written."""
    from equigemma.checkpoint import load_chat_template

    source = load_chat_template(model) if format in ("auto", "file") else None
    if format == "file" and source is None:
        raise ValueError(f"{model} has no chat template; --format gemma or gemma4 chooses one.")
    # What is wrong with a template shows before the weights are read.
    chosen = _format(format, source, thinking)
    weights, tokenizer = read_as()
    if chosen is None:
        chosen = _by_vocabulary(tokenizer, thinking)
        console.print(
            f"{model} has no chat template, so it may not have been trained to answer. "
            f"Conversations are written in the way of {type(chosen).__name__}.",
            markup=False,
        )
    return weights, tokenizer, chosen


class _Session:
    """The conversation under way, and what a line does to it."""

    def __init__(
        self,
        start: Any,
        model: str,
        console: Console,
        options: dict[str, Any],
        seed: int,
        images: Sequence[Any] = (),
        as_json: bool = False,
    ):
        self._start = self._chat = start
        self._model = model
        self._console = console
        self._options = options
        self._seed = seed
        self._images = tuple(images)
        self._as_json = as_json

    def show(self, path: Path) -> None:
        """Puts an image to the next message.

        **Raises:** `ValueError` if it is none, or the model cannot see.
        """
        from equigemma.images import Picture

        if self._start.model.vision is None:
            raise ValueError(f"{self._model} reads text only: it has no vision tower for images.")
        self._images += (Picture(path),)

    def take(self, line: str) -> None:
        """Answers a message, or does what a command says. A mistake costs nothing but the line."""
        text = line.strip()
        if not text:
            return
        try:
            if text.startswith("/"):
                self._command(*text.partition(" ")[::2])
            else:
                self._answer(text)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            self._say(f"Error: {error}")

    def _command(self, name: str, argument: str) -> None:
        path = Path(argument.strip()).expanduser()
        match name:
            case "/help":
                self._say(HELP)
            case "/reset":
                self._chat, self._images = self._start, ()
                self._say("What was said is forgotten.")
            case "/save" | "/load" | "/image" if not argument.strip():
                raise ValueError(f"{name} needs the name of a file.")
            case "/image":
                self.show(path)
                self._say(f"{path} is shown with the next message.")
            case "/save":
                save(path, self._chat.messages, self._model)
                self._say(f"Saved to {path}.")
            case "/load":
                self._chat = self._with(read(path))
                self._say(f"{len(self._chat.messages)} messages from {path}.")
            case _:
                raise ValueError(f"There is no command {name}; /help names those there are.")

    def _with(self, messages: tuple) -> Any:
        start, prefix_cache = self._start, self._chat.prefix_cache
        return type(start)(
            start.model,
            start.tokenizer,
            format=start.format,
            messages=messages,
            capacity=start.capacity,
            prefix_cache=prefix_cache,
        )

    def _answer(self, text: str) -> None:
        from equigemma.chat import User, to_json

        turn = None
        try:
            # Another seed for each turn: else equal questions would have equal answers.
            seed = self._seed + len(self._chat.messages)
            turn = self._chat.stream(User(text, self._images), seed=seed, **self._options)
            for piece in turn:
                if self._as_json:
                    continue
                out = sys.stdout if piece.kind == "text" else sys.stderr
                out.write(piece.text)
                out.flush()
        except KeyboardInterrupt:
            self._say("\nStopped.")
        if turn is not None and turn.new_tokens:
            self._chat, self._images = turn.chat, ()
            if self._as_json:
                sys.stdout.write(json.dumps(to_json(turn.chat.messages[-1]), ensure_ascii=False))
        elif self._as_json:
            return
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)


def save(path: Path, messages: tuple, model: str) -> None:
    """Writes a conversation as JSON; the file is there whole or not at all."""
    from equigemma.chat import to_json
    from equigemma.checkpoint.core import new_file, write_json

    with new_file(path) as partial:
        write_json(
            partial,
            {
                "format": _KIND,
                "version": 1,
                "model": model,
                "messages": [to_json(message) for message in messages],
            },
        )


def read(path: Path) -> tuple:
    """The messages of a file that `save` wrote.

    **Raises:** `ValueError` if it is no such file, or no conversation that could go on.
    """
    from equigemma.chat import User, check_order, from_json
    from equigemma.checkpoint.core import read_json

    data = read_json(path)
    entries = data.get("messages")
    if data.get("format") != _KIND or data.get("version") != 1 or not isinstance(entries, list):
        raise ValueError(f"{path} is no conversation that /save wrote: its format is another.")
    messages = []
    for number, entry in enumerate(entries, start=1):
        try:
            messages.append(from_json(entry))
        except ValueError as error:
            raise ValueError(f"{path}: message {number}: {error}") from error
    try:
        check_order([*messages, User("")])
    except ValueError as error:
        raise ValueError(f"{path} holds no conversation that can go on: {error}") from error
    return tuple(messages)


_KIND = "equigemma chat"


def _format(name: FormatName, source: str | None, thinking: bool) -> Any:
    """The format asked for; None: the vocabulary is to decide."""
    from equigemma.chat import Gemma, Gemma4, Template

    if source is not None:
        return Template(source, thinking=thinking)
    if name == "gemma4":
        return Gemma4(thinking=thinking)
    if name == "gemma":
        return _without_thinking(Gemma(), thinking)
    return None


def _by_vocabulary(tokenizer: Any, thinking: bool) -> Any:
    from equigemma.chat import Gemma4, default_format

    found = default_format(tokenizer)
    if isinstance(found, Gemma4):
        return Gemma4(thinking=thinking)
    return _without_thinking(found, thinking)


def _without_thinking(format: Any, thinking: bool) -> Any:
    if thinking:
        raise ValueError("Gemma 1, 2 and 3 have no way to think before they answer: no --thinking.")
    return format
