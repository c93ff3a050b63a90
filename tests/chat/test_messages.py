"""Messages as JSON: as OpenAI's interface, `transformers` and `datasets` write them."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from equigemma.chat import (
    Assistant,
    Gemma4,
    System,
    ToolCall,
    ToolResult,
    User,
    from_json,
    to_json,
    tool_schema,
)
from equigemma.chat._messages import with_names


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, null]}'}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"role": "user", "content": "h", "name": "ann"}, User("h", name="ann")),
        ({"role": "user", "content": "h", "name": None, "tool_calls": None}, User("h")),
        ({"role": "developer", "content": "h"}, System("h", role="developer")),
        ({"role": "system", "content": "h", "name": "s"}, System("h", name="s")),
        ({"role": "assistant", "content": None, "refusal": None, "annotations": []}, Assistant("")),
        (
            {"role": "assistant", "content": "h", "function_call": None, "audio": None},
            Assistant("h"),
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            Assistant("", calls=(ToolCall("f", {"x": [1, None]}, id="c1"),)),
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
            Assistant("", calls=(ToolCall("f", {}),)),
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}],
            },
            Assistant("", calls=(ToolCall("f", {"a": None}),)),
        ),
        (
            {"role": "assistant", "content": "h", "reasoning": "hm", "tool_calls": []},
            Assistant("h", "hm"),
        ),
        ({"role": "assistant", "content": "h", "thinking": "hm"}, Assistant("h", "hm")),
        (
            {"role": "tool", "tool_call_id": "c1", "content": "5", "name": None},
            ToolResult("", "5", tool_call_id="c1"),
        ),
        ({"role": "tool", "name": "f", "content": {"a": None}}, ToolResult("f", {"a": None})),
        ({"role": "tool", "name": "f", "content": None}, ToolResult("f", None)),
        (
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a ", "image": None},
                    {"type": "text", "text": "b", "path": None},
                ],
            },
            User("a b", as_parts=True),
        ),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            Assistant("a", as_parts=True),
        ),
        (
            {"role": "system", "content": [{"type": "text", "text": "a"}]},
            System("a", as_parts=True),
        ),
    ],
)
def test_messages_of_others(entry, message):
    assert from_json(entry) == message
    again = json.loads(json.dumps(to_json(message)))
    assert from_json(again) == message


def test_images_of_others(tmp_path):
    PIL = pytest.importorskip("PIL.Image", reason="images are the extra `images`")
    pixels = np.arange(75, dtype=np.uint8).reshape(5, 5, 3)
    path = str(tmp_path / "x.png")
    PIL.fromarray(pixels).save(path)
    data = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
    text = {"type": "text", "text": "h", "image": None}
    parts = [
        {"type": "image", "path": path, "text": None},
        {"type": "image", "image": PIL.open(path)},
        {"type": "image", "url": data},
        {"type": "image_url", "image_url": {"url": data, "detail": "low"}},
    ]
    for part in parts:
        message = from_json({"role": "user", "content": [part, text]})
        assert message.text == "<start_of_image>h"
        np.testing.assert_array_equal(message.images[0].rgb, pixels)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (
            {"role": "user", "content": [{"type": "image"}]},
            "does not say which image it is: give it",
        ),
        ({"role": "user", "content": [{"type": "audio", "path": "x"}]}, "A part of a message is"),
        ({"role": "user", "content": "h", "weight": 0}, "nothing called weight, got"),
        (
            {"role": "narrator", "content": "h"},
            "with the role system, developer, user, assistant or",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": "{x: 1}"}}],
            },
            "The arguments of the call of f are text that is not JSON: '{x: 1}'",
        ),
    ],
)
def test_what_is_no_message_says_what_is_wrong(entry, says):
    with pytest.raises(ValueError, match=says) as error:
        from_json(entry)
    assert len(str(error.value)) < 300


def called(*names: str | None, ids: bool = False) -> Assistant:
    made = [ToolCall(n, id=f"c{i}" if ids else None) for i, n in enumerate(names)]
    return Assistant("", calls=tuple(made))


@pytest.mark.parametrize(
    ("messages", "names"),
    [
        ([called("f"), ToolResult("", 1)], ["f"]),
        ([called("f", "g"), ToolResult("", 1), ToolResult("", 2)], ["f", "g"]),
        ([called("f", "g"), ToolResult("g", 1), ToolResult("", 2)], ["g", "f"]),
        (
            [
                called("f", "g", ids=True),
                ToolResult("", 1, tool_call_id="c1"),
                ToolResult("", 2, tool_call_id="c0"),
            ],
            ["g", "f"],
        ),
        ([called("f"), ToolResult("other", 1)], ["other"]),
        ([called("f"), ToolResult("", 1), User("h"), called("g"), ToolResult("", 1)], ["f", "g"]),
    ],
)
def test_results_are_told_apart(messages, names):
    named = with_names([User("h"), *messages])
    assert [message.name for message in named if isinstance(message, ToolResult)] == names


@pytest.mark.parametrize(
    "messages",
    [
        [called("f", ids=True), ToolResult("", 1, tool_call_id="other")],
        [called("f"), ToolResult("", 1), ToolResult("", 2)],
    ],
)
def test_a_result_of_no_call(messages):
    with pytest.raises(
        ValueError, match="is a ToolResult without a name, and no call before it (has|is)"
    ):
        with_names([User("h"), *messages])


def test_gemma_4_names_the_function_of_a_result():
    pytest.importorskip("gguf_files", reason="the vocabulary is that of the tiny GGUF files")
    import chat_models

    tokenizer = chat_models.tokenizer(chat_models.GEMMA4)
    messages = [
        {"role": "user", "content": "h"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    ]
    ids = Gemma4().encode(tokenizer, list(map(from_json, messages)))
    assert tokenizer.decode(ids).endswith("call:f{x:[1,null]}response:f{value:5}")


def plain(x, y: int):
    """Does.

    Args:
        x: x
        y: y
    """


def undescribed(x: int):
    """Does."""


def odd(x: bytes):
    """Does.

    Args:
        x: x
    """


def silent(x: int): ...


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        (plain, "The argument x of plain has no type"),
        (undescribed, "The docstring of undescribed does not describe the argument x"),
        (odd, r"The type <class 'bytes'> of odd\(x\) has no form in JSON that is known"),
        (silent, "The function silent has no docstring"),
        (5, "A tool is a function with types and a docstring, or a description"),
        (print, "A tool is a function with types and a docstring, or a description"),
    ],
)
def test_what_is_no_tool(tool, says):
    with pytest.raises(ValueError, match=says):
        tool_schema(tool)
