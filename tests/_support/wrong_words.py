"""Wrong calls around words and images, and what their errors say."""

import formats
import numpy as np

import equigemma as eg
from equigemma.chat import Assistant, Gemma, System, Template, ToolCall, ToolResult, User
from equigemma.embedding import EmbedderSettings
from equigemma.text import IncrementalDetokenizer


MODEL, TOKENIZER = formats.model(formats.CONFIGS["gemma3"]), formats.tokenizer()
PIXELS = np.zeros((5, 5, 3), np.uint8)


def generate(prompt="hello", **options):
    return eg.generate(MODEL, TOKENIZER, prompt, **options)


def talk(message="hello", *, system=None, **options):
    return eg.Chat(MODEL, TOKENIZER, format=Gemma(), system=system).send(message, **options)


WORDS = {
    "a prompt of bytes": (
        lambda: generate(b"hello"),
        "`prompt` must be a str or a list of str, got b",
    ),
    "no prompt": (lambda: generate(None), "`prompt` must be a str or a list of str, got None; ids"),
    "a prompt of ids": (lambda: generate([2, 5]), "ids go to equigemma.sampling.generate"),
    "a stream of several": (
        lambda: eg.stream(MODEL, TOKENIZER, ["a", "b"]),
        "`prompt` must be one str here, got ['a', 'b']",
    ),
    "one image for several": (
        lambda: generate(["a", "b"], images="cat.png"),
        "There are 2 prompts and images for one of them; pass a list with the images of each",
    ),
    "one array for several": (
        lambda: generate(["a", "b"], images=PIXELS),
        "There are 2 prompts and images for one of them",
    ),
    "stop strings of ids": (
        lambda: generate(stop_strings=[1]),
        "`stop_strings` must be a list of str, got [1]; ids that end a text are `stop`",
    ),
    "no stop strings": (
        lambda: generate(stop_strings=None),
        "`stop_strings` must be a list of str",
    ),
    "an empty stop string": (lambda: generate(stop_strings=[""]), "needs at least one character"),
    "stop strings in a chat": (lambda: talk(stop_strings=[None]), "`stop_strings` must be a list"),
    "stop strings of a detokenizer": (
        lambda: IncrementalDetokenizer(TOKENIZER, b"x"),
        "`stop_strings` must be a list",
    ),
    "a message of a number": (
        lambda: talk(5),
        "`message` must be a str, a message or a list of mess",
    ),
    "no message": (lambda: talk(None), "`message` must be a str, a message or a list of messages"),
    "messages of a dict": (
        lambda: talk([{"role": "user"}]),
        "Message 1 must be a System or a User",
    ),
    "a system that is a message": (
        lambda: talk(system=System("h")),
        "`system` must be a str; a Sys",
    ),
    "a system of bytes": (lambda: talk(system=b"h"), "`text` of a System must be a str, got b'h'"),
    "a length of a text": (
        lambda: talk(max_new_tokens="5"),
        "`max_new_tokens` must be a whole number, got '5'",
    ),
    "a capacity that is not whole": (
        lambda: eg.Chat(MODEL, TOKENIZER, format=Gemma(), capacity=2.5),
        "`capacity` must be a whole number, got 2.5",
    ),
    "a role of its own": (
        lambda: System("h", role="narrator"),
        "`role` of a System must be system or developer, got 'narrator'",
    ),
    "a user of bytes": (lambda: User(b"h"), "`text` of a User must be a str, got b'h'"),
    "a user who says nothing": (lambda: User(None), "`text` of a User must be a str, got None"),
    "an answer without text": (
        lambda: Assistant(None),
        "`text` of an Assistant must be a str, got None",
    ),
    "thoughts of a list": (
        lambda: Assistant("h", ["h"]),
        "`thinking` of an Assistant must be a str, got",
    ),
    "calls of names": (
        lambda: Assistant("h", calls=["f"]),
        "`calls` of an Assistant must be ToolCall, got 'f",
    ),
    "arguments as text": (
        lambda: ToolCall("f", '{"x": 1}'),
        "`arguments` of a ToolCall must be a Mapping, got",
    ),
    "a result without a name": (
        lambda: ToolResult(None, 1),
        "`name` of a ToolResult must be a str",
    ),
    "no template": (
        lambda: Template(None),
        "`source` must be a chat template as a str, got None; a",
    ),
    "a value that JSON does not have": (
        lambda: Template("", variables={"x": object()}).encode(TOKENIZER, [User("h")]),
        "A chat template takes values that JSON has, got a object",
    ),
    "documents of texts": (
        lambda: Template("", documents=["h"]),
        "Each of the `documents` must be an object with a title and a text",
    ),
    "a tool that is a name": (
        lambda: Template("", tools=["f"]),
        "A tool is a function with types and",
    ),
    "a conversation of one string": (lambda: Gemma().encode(TOKENIZER, "h"), "Message 1 must be a"),
    "no text to a tokenizer": (lambda: TOKENIZER.encode(None), "`text` must be a str, got None"),
    "ids that are no numbers": (lambda: TOKENIZER.decode(["h"]), "`ids` must be whole numbers, as"),
    "several rows of ids": (lambda: TOKENIZER.decode([[1], [2]]), "`ids` must be one row of ids"),
    "an image of a list": (lambda: User("h", [[1, 2]]), "An image must be uint8"),
    "an image from the web": (
        lambda: User("h", "https://example.com/cat.png"),
        "nothing is downloaded here. `curl -LO https://example.com/cat.png` does it",
    ),
    "a length without room": (
        lambda: EmbedderSettings(max_length=2),
        "max_length must leave room for a text beside the 2 tokens around it, got 2",
    ),
    "an unknown prompt": (
        lambda: EmbedderSettings(default_prompt_name="x"),
        "There is no prompt called 'x'; the model has document, query",
    ),
}
