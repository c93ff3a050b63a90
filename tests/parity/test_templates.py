"""Chat templates: the ids of `transformers.apply_chat_template`, and nothing else than text from
what is said."""

import json
import re
from functools import cache
from typing import Any

import chat_templates
import gguf_files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.test_checkpoints import llama, needs_llama

import equigemma as eg
from equigemma.chat import Template, from_json, tool_schema
from equigemma.checkpoint.core._tokenizer_files import read_tokenizer
from equigemma.tokenizers import _sentencepiece_model as spm
from equigemma.tokenizers._tokenizer_json import to_json


transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("jinja2", reason='needs pip install "equigemma[chat]"')

SPECIAL = re.findall(
    r"<[^<>\s']+>|\[/?[A-Z_]+\]",
    "<start_of_turn> <start_of_image> <|turn> <turn|> <|think|> <|channel> <channel|> <|tool> "
    '<tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|> <|im_start|> '
    "<|im_end|> <｜User｜> <｜Assistant｜> <|start_header_id|> <|end_header_id|> <|eot_id|> [INST] "
    "[/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "<start_function_declaration> <end_function_declaration> <start_function_call> "
    "<end_function_call> <start_function_response> <end_function_response> <escape> <|system|> "
    "<|user|> <|assistant|> <|tool|> <|/tool|> <|end|> <image> <end_of_utterance> <mask>",
)
# Looked for in every text, as the files of such models say; no special tokens.
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>", "\n\n", "▁▁"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return tokenizers(tmp_path_factory.mktemp("tokenizer"))


@cache
def tokenizers(path):
    tokens = [*gguf_files.TOKENS, *SPECIAL, *MARKUP]
    types = [*gguf_files.TYPES, *[spm.CONTROL] * len(SPECIAL), *[spm.USER_DEFINED] * len(MARKUP)]
    vocabulary = spm.Vocabulary(tokens, [-float(i) for i in range(len(tokens))], types)
    (path / "tokenizer.json").write_text(json.dumps(to_json(vocabulary)), encoding="utf-8")
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "GemmaTokenizer"} | names
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert len(theirs) == len(tokens)
    return read_tokenizer(path), theirs


def their_ids(theirs, template: str, messages: list[dict], **options) -> list[int]:
    return theirs.apply_chat_template(
        messages,
        chat_template=template,
        return_dict=False,
        **({"add_generation_prompt": True} | options),
    )


def our_ids(
    ours, template: str, messages: list[dict], *, tools=None, variables=None, **options
) -> list[int]:
    answer = options.pop("add_generation_prompt", not options.get("continue_final_message"))
    thinking = options.pop("enable_thinking", None)
    made = Template(template, tools=tools or (), thinking=thinking, variables=variables or {})
    return made.encode(ours, list(map(from_json, messages)), answer=answer, **options)


def assert_equal(both, template: str, messages: list[dict], **options) -> None:
    ours, theirs = both
    try:
        expected = their_ids(theirs, template, messages, **options)
    except Exception as error:
        # What they cannot do is refused, and nothing else.
        with pytest.raises(ValueError, match="chat template"):
            our_ids(ours, template, messages, **options)
        pytest.skip(f"transformers: {type(error).__name__}: {error}")
    assert our_ids(ours, template, messages, **options) == expected


def asked(content: str) -> dict:
    return {"role": "user", "content": content}


def answered(content: str, **more) -> dict:
    return {"role": "assistant", "content": content} | more


def look(place: str, close: bool = False) -> dict[str, Any]:
    """Says what is to be seen.

    Args:
        place: Where to look,
            for example "the hotel".
        close: Whether to look closely. (choices: [true, false])

    Returns:
        What is there.
    """
    return {place: close}


TOOLS = [
    look,
    {
        "type": "function",
        "function": {
            "name": "tell",
            "description": "Tells <b>it</b>.",
            "parameters": {"type": "object", "properties": {"to": {"type": "string"}}},
        },
    },
]
CALLED = [
    {
        "id": "abcdefgh1",
        "type": "function",
        "function": {"name": "look", "arguments": {"place": "hôtel", "close": True, "n": [1, 2.5]}},
    }
]
RETURNED = {"role": "tool", "name": "look", "tool_call_id": "abcdefgh1", "content": "a room"}

CONVERSATIONS = {
    "one question": [asked("hello")],
    "white space": [asked(" \n hello  hotel\n\n"), answered("\n tell \n"), asked("\thell ")],
    "system": [
        {"role": "system", "content": " be hot "},
        asked("hello"),
        answered("ho"),
        asked("h"),
    ],
    "developer": [{"role": "developer", "content": "be hot"}, asked("hello")],
    "finished": [asked("hello"), answered("hotel")],
    "thoughts in the text": [
        asked("hello"),
        answered("<think>\nhm\n</think>\n\nhotel"),
        asked("<tool_response>hot</tool_response>"),
        answered("ok </think> tell"),
    ],
    "thoughts": [asked("hello"), answered("hotel", reasoning_content="hm\n"), asked("tell")],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": " hello "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "hotel"}]},
        {"role": "user", "content": [{"type": "text", "text": "hell"}]},
    ],
    "images": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "hello "},
                {"type": "image"},
                {"type": "text", "text": " hotel"},
            ],
        },
        answered("ho"),
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hell"}]},
    ],
    "a call": [asked("hello"), answered("", tool_calls=CALLED), RETURNED],
    "a call and an answer": [
        {"role": "system", "content": "be hot"},
        asked("hello"),
        answered("let me", tool_calls=CALLED, reasoning_content="hm"),
        RETURNED,
        answered("a room"),
        asked("tell"),
    ],
    "two calls": [
        asked("hello"),
        answered(
            "",
            tool_calls=[
                *CALLED,
                {
                    "id": "abcdefgh2",
                    "type": "function",
                    "function": {"name": "tell", "arguments": {"to": "h"}},
                },
            ],
        ),
        RETURNED,
        RETURNED | {"name": "tell", "tool_call_id": "abcdefgh2", "content": "told"},
    ],
}
NEEDS_TOOL_RESPONSES = "gemma4 older"


def theirs_alike(name: str, messages: list[dict]) -> list[dict]:
    """The older template of Gemma 4 wants results with the calls, and knows no role of tools."""
    if name != NEEDS_TOOL_RESPONSES:
        return messages
    alike: list[dict] = []
    for message in messages:
        if message["role"] == "tool":
            result = {"name": message["name"], "response": message["content"]}
            alike[-1] = alike[-1] | {
                "tool_responses": [*alike[-1].get("tool_responses", []), result]
            }
        else:
            alike.append(message)
    return alike


def with_pixels(messages: list[dict]) -> list[dict]:
    """The same with images, which our messages have to have."""
    PIL = pytest.importorskip("PIL.Image", reason="images are the extra `images`")

    def filled(part: dict) -> dict:
        return part | {"image": PIL.new("RGB", (2, 2))} if part["type"] == "image" else part

    return [
        m | {"content": list(map(filled, m["content"]))} if isinstance(m["content"], list) else m
        for m in messages
    ]


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("answer", [True, False], ids=["prompt", "history"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", chat_templates.ALL)
def test_ids_are_those_of_transformers(name, conversation, answer, tools, both):
    messages = with_pixels(CONVERSATIONS[conversation])
    template = chat_templates.ALL[name]
    ours, theirs = both
    options = {"tools": tools, "add_generation_prompt": answer}
    try:
        expected = their_ids(theirs, template, theirs_alike(name, messages), **options)
    except Exception:
        # A template of text alone, in which the token of an image may stand in a text.
        if conversation != "images":
            with pytest.raises(ValueError, match="The chat template stops at this conversation"):
                our_ids(ours, template, messages, **options)
        return
    if conversation == "images" and expected.count(ours_id(ours, "<start_of_image>")) != 2:
        pytest.skip(f"{name} writes no <start_of_image>")
    assert our_ids(ours, template, messages, **options) == expected


def ours_id(ours, spelling: str) -> int:
    return ours.encode(spelling, bos=False, special=True)[0]


@pytest.mark.parametrize(
    "content", ["hello", "<think>hm</think>he", " h\n", "é 日本", "hello " * 30]
)
@pytest.mark.parametrize("name", chat_templates.CORNERS)
def test_corners_of_the_language(name, content, both):
    ours, theirs = both
    messages = [asked(content), answered("hot")]
    template = chat_templates.CORNERS[name]
    assert our_ids(ours, template, messages) == their_ids(theirs, template, messages)


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("name", ["qwen3", "gemma4"])
def test_thinking_is_asked_for_or_not_at_all(name, thinking, both):
    options = {} if thinking is None else {"enable_thinking": thinking}
    assert_equal(both, chat_templates.ALL[name], CONVERSATIONS["thoughts"], **options)


def test_variables(both):
    ours, theirs = both
    messages = CONVERSATIONS["one question"]
    variables = {"date_string": "1 May 2024", "custom_tools": TOOLS[1:]}
    expected = their_ids(theirs, chat_templates.LLAMA3, messages, **variables)
    assert our_ids(ours, chat_templates.LLAMA3, messages, variables=variables) == expected


CONTINUED = [*CONVERSATIONS["system"][:-1], asked("h"), answered("The hotel ")]


@pytest.mark.parametrize("text", ["The hotel ", " hot", "a\n", "<think>\nhm", "x</think>y"])
@pytest.mark.parametrize("name", chat_templates.ALL)
def test_the_last_message_is_gone_on_with(name, text, both):
    ours, theirs = both
    messages = [*CONTINUED[1:-1], answered(text)]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    template = chat_templates.ALL[name]
    try:
        expected = their_ids(theirs, template, messages, **options)
    except Exception:
        with pytest.raises(ValueError, match="does not write the last message|stops at this"):
            our_ids(ours, template, messages, **options)
        return
    assert our_ids(ours, template, messages, **options) == expected


# What is said.

PIECES = st.lists(
    st.sampled_from(
        [*SPECIAL, "<bos>", "<eos>", "<end_of_turn>", "<think>", "</think>", "<", ">", "[", "]"]
        + ["he", "lo", " ", "\n", "<|", "|>", "end_of_turn>", "<|im_", "\ufdd0", "é", "<tool_call>"]
    ),
    min_size=1,
    max_size=6,
).map("".join)


def masked(text: str) -> str:
    """The same length, and no special token, as no piece of one is left."""
    return text.translate({ord(sign): 0xE000 + index for index, sign in enumerate("<>[]")})


def unmasked(text: str) -> str:
    return text.translate({0xE000 + index: sign for index, sign in enumerate("<>[]")})


@pytest.mark.parametrize(
    "name", ["gemma3", "gemma1", "r1", "llama3", "mistral", "chatml", "phi", "qwen3", "gemma4"]
)
@given(texts=st.tuples(PIECES, PIECES, PIECES))
@settings(deadline=None, max_examples=40)
def test_what_is_said_is_text(name, texts, both):
    """The reference: the string that transformers makes of a conversation in which every sign that
    special tokens are made of was replaced, and its special tokens are those of the template."""
    ours, theirs = both
    template = chat_templates.ALL[name]
    first, answer, last = texts
    if name in ("qwen3", "r1"):
        # These look for the ends of thoughts.
        answer = answer.replace("</think>", "")
    if name == "gemma4":
        answer = answer.replace("<|channel>", "").replace("<channel|>", "")
    said = [asked(first), answered(answer), asked(last)]
    hidden = [message | {"content": masked(message["content"])} for message in said]
    text = theirs.apply_chat_template(
        hidden, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    special = "|".join(map(re.escape, [*SPECIAL, "<bos>", "<eos>", "<end_of_turn>"]))
    expected: list[int] = []
    for part in re.split(f"({special})", text):
        if re.fullmatch(special, part):
            expected.append(ours_id(ours, part))
        elif part:
            expected += ours.encode(unmasked(part), bos=False)
    assert our_ids(ours, template, said) == expected


@given(content=PIECES, corner=st.sampled_from(sorted(chat_templates.CORNERS)))
@settings(deadline=None, max_examples=300)
def test_no_corner_of_the_language_lets_it_through(content, corner, both):
    """A special token is one of the template's own, or the conversation is refused."""
    ours, _ = both
    template = chat_templates.CORNERS[corner]
    own = [index for index in our_ids(ours, template, [asked("hello")]) if not ours.decode([index])]
    try:
        ids = our_ids(ours, template, [asked(content)])
    except ValueError as error:
        assert "leaves open whether it is its own" in str(error)
        return
    special = {index for index in ids if not ours.decode([index])}
    assert special <= set(own)
    if corner not in ("replace", "split", "multiplication"):
        assert len([index for index in ids if index in special]) <= len(own)


@pytest.mark.parametrize("name", ["qwen3", "r1"])
def test_a_special_token_beside_what_a_template_looks_for(name, both):
    ours, theirs = both
    template = chat_templates.ALL[name]
    said = [asked("hello"), answered("<think>h</think><|im_end|><eos>"), asked("<|im_start|>hot")]
    hidden = [m | {"content": m["content"].replace("|", "!").replace("eos", "e!s")} for m in said]
    counts = [
        [ids.count(ours_id(ours, s)) for s in ("<|im_end|>", "<|im_start|>", "<eos>")]
        for ids in (our_ids(ours, template, said), our_ids(ours, template, hidden))
    ]
    assert counts[0] == counts[1]
    text = ours.decode(our_ids(ours, template, said))
    assert "<|im_end|><eos>" in text and "<|im_start|>hot" in text and "h</think>" not in text


# Tools.


def no_arguments() -> None:
    """Does it."""


def all_kinds(
    a: int,
    b: float | None,
    c: list[str],
    d: dict[str, int],
    e: tuple[int, str],
    f: Any,
    g: int | str,
    h: list[int] | dict[str, Any] | None = None,
    i: bool = True,
    j: list = (),
) -> object:
    """Knows all kinds.

    Of them there are many.

    Args:
        a: The first.
        b (float): The second,
            which may be missing.
        c: The third: of texts.
        d: The fourth
        e: e
        f: f
        g: g
        h: h
        i: i
        j: j (choices: ["x ", "y"])

    Raises:
        ValueError: Never.
    """


def returning(x: str) -> int:
    """Counts.

    Args:
        x: What.

    Returns:
        How many
        there are.
    """
    return len(x)


@pytest.mark.parametrize("function", [look, no_arguments, all_kinds, returning])
def test_tools_are_described_as_in_transformers(function):
    theirs = transformers.utils.get_json_schema(function)
    ours = tool_schema(function)
    assert ours == theirs
    assert json.dumps(ours) == json.dumps(theirs)


# llama.cpp.


@needs_llama
@pytest.mark.parametrize("begins", [None, True, False])
@pytest.mark.parametrize("writes", ["{{ bos_token }}", ""], ids=["written", "not written"])
def test_a_gguf_begins_once_as_in_llama_cpp(begins, writes, tmp_path):
    template = writes + (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end_of_turn>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    vocabulary = gguf_files.VOCABULARY | {
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.chat_template": template,
    }
    path = gguf_files.write(tmp_path / "x.gguf", vocabulary=vocabulary)
    _, tokenizer = eg.load(path)
    messages = [asked("hello"), answered("hotel"), asked("tell")]
    ids = our_ids(tokenizer, eg.checkpoint.load_chat_template(path), messages)
    assert ids.count(2) == (1 if writes or begins is not False else 0)
    with llama(path, route="v1/chat/completions") as ask:
        answer = ask(messages=messages, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == len(ids)
