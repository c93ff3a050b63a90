"""Files of texts as examples: what is learned, what is given, and which line is bad."""

import gzip
import json

import numpy as np
import pytest

from equigemma import chat, data


gguf_files = pytest.importorskip("gguf_files", reason="GGUF files are written by the gguf library")
pytest.importorskip("sentencepiece", reason="the tokenizer is the extra `gguf`")

from equigemma.checkpoint import load  # noqa: E402


# Without the time of day, as all workers of pytest must see the same tests.
GZIPPED = gzip.compress(b'{"text": "lo"}', mtime=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(gguf_files.write(tmp_path_factory.mktemp("data") / "tiny.gguf"))[1]


def lines(path, *entries):
    texts = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def learned(example) -> list[int]:
    return [
        int(token) for token, weight in zip(example.tokens, example.weights, strict=True) if weight
    ]


def test_a_text_is_learned_from_beginning_to_end(tokenizer, tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "hello hello", "source": "x"}, "", {"text": "lo"})
    first, second = data.read(path, tokenizer)
    ids = tokenizer.encode("hello hello")
    assert first.tokens.tolist() == [*ids, tokenizer.special.eos]
    assert ids[0] == tokenizer.special.bos
    assert first.weights.tolist() == [1] * len(first.tokens)
    assert tokenizer.decode(second.tokens) == "lo"


@pytest.mark.parametrize("name", ["a.txt", "README", "a.md"])
def test_any_other_file_is_one_text(tokenizer, tmp_path, name):
    path = tmp_path / name
    path.write_text("hello\n\nlöt {", encoding="utf-8")
    (example,) = data.read(path, tokenizer)
    assert tokenizer.decode(example.tokens) == "hello\n\nlöt {"
    assert example.tokens[-1] == tokenizer.special.eos


RECORDS = [{"text": "hello"}, {"prompt": "hello", "completion": "lo"}, {"text": "hot\nlo"}]
SPELLINGS = {
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "lines of Windows": "\r\n".join(map(json.dumps, RECORDS)) + "\r\n",
    "lines of an old Macintosh": "\r".join(map(json.dumps, RECORDS)),
    "lines between blank ones": "\n\n \n".join(map(json.dumps, RECORDS)) + "\n\n",
    "an array": json.dumps(RECORDS),
    "an indented array": json.dumps(RECORDS, indent=2),
    "indented records": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.txt", "records"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte-order mark"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_records_are_found_however_they_are_written(tokenizer, tmp_path, spelling, mark, name):
    path = tmp_path / name
    path.write_bytes(f"{mark}{SPELLINGS[spelling]}".encode())
    found = data.read(path, tokenizer)
    expected = [example for record in RECORDS for example in data.from_record(record, tokenizer)]
    assert [example.tokens.tolist() for example in found] == [
        example.tokens.tolist() for example in expected
    ]
    assert [example.weights.tolist() for example in found] == [
        example.weights.tolist() for example in expected
    ]


@pytest.mark.parametrize(
    "content", ['{"a": 1}\n{"b": 2}', "{hello}", "[1, 2]", '["text"]', "{", '{"text": ']
)
def test_text_that_only_looks_like_records_is_text(tokenizer, tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(f"\ufeff{content}".encode())
    (example,) = data.read(path, tokenizer)
    assert tokenizer.decode(example.tokens) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello\n", "line 1: not JSON: Expecting value at column 1"),
        ('[{"text": "lo"},\n {"text": "hot"}\n {"text": "lo"}]', "line 3: .*a comma is missing"),
        ('[\n{"text": "lo"},\n]', "line 3: not JSON: Expecting value"),
        ('[{"text": "lo"},\n{"text": ]', "line 2: not JSON: Expecting value at column 10"),
        ('[{"text": "lo"}\n', "line 2: not JSON: the array does not end"),
        ('[{"text": "lo"}]\n[]', "line 2: not JSON: there is something after the array"),
        ('[{"text": "lo"},\n\n{"txt": "lo"}, 5]', "line 3: expected either 'text'"),
        ('[{"text": "lo"},\n\n{"txt": "lo"},\n5]', "line 4: expected an object, got 5"),
        ('{\n"text":\n5}\n{"text": "lo"}', "line 1: 'text' must be text"),
        ('{"data":\n[{"text": "lo"}]}', "line 1: expected either 'text', .* got none of them"),
        ("[]", "the file has no records"),
        ("[" * 100_000, "line 1: .*nested too deep"),
        ('{"text": "lo"}\n{"text": ' + "9" * 5000 + "}", "line 2: .*integer"),
    ],
)
def test_what_is_wrong_with_a_json_file_is_said_with_its_line(
    tokenizer, tmp_path, content, message
):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        data.read(path, tokenizer)
    assert len(str(error.value)) < 500


def test_columns_without_a_value_are_not_there(tokenizer, tmp_path):
    """`datasets` writes every column of a table in every record."""
    path = lines(
        tmp_path / "a.jsonl",
        {"text": "hello", "messages": None, "prompt": None, "completion": None, "id": 7},
        {"text": None, "messages": CONVERSATION["messages"], "tools": None},
        {"prompt": "the same, for those who look", "messages": CONVERSATION["messages"]},
    )
    text, one, other = data.read(path, tokenizer, format=Turns())
    assert tokenizer.decode(text.tokens) == "hello"
    (expected,) = data.from_record(CONVERSATION, tokenizer, format=Turns())
    for example in (one, other):
        assert example.tokens.tolist() == expected.tokens.tolist()
        assert example.weights.tolist() == expected.weights.tolist()


def test_of_a_prompt_and_completion_of_messages_the_completion_is_learned(tokenizer, tmp_path):
    messages = CONVERSATION["messages"]
    path = lines(tmp_path / "a.jsonl", {"prompt": messages[:4], "completion": messages[4:]})
    (example,) = data.read(path, tokenizer, format=Turns())
    (whole,) = data.from_record(CONVERSATION, tokenizer, format=Turns())
    assert example.tokens.tolist() == whole.tokens.tolist()
    last = [*tokenizer.encode("el", bos=False), tokenizer.special.end_of_turn]
    assert learned(example) == last
    # As trl has it: all that follows the prompt, with the tokens that begin the answer. What
    # follows the end of the answer, no one has to write.
    said = [chat.from_json(entry) for entry in messages]
    prompt = Turns().encode(tokenizer, said[:4])
    assert example.weights.tolist() == [0] * len(prompt) + [1] * (len(whole.tokens) - len(prompt))


def test_answers_of_weight_0_are_given(tokenizer, tmp_path):
    first, *rest = [dict(entry) for entry in CONVERSATION["messages"]]
    rest[1]["weight"], rest[3]["weight"] = 0, 1
    (example,) = data.from_record({"messages": [first, *rest]}, tokenizer, format=Turns())
    assert learned(example) == [*tokenizer.encode("el", bos=False), tokenizer.special.end_of_turn]


CALLS = {
    "messages": [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "lo", "arguments": '{"hot": "el"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "hot"},
        {"role": "assistant", "content": "hello hello", "tool_calls": None},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "lo", "description": "hot", "parameters": {"type": "object"}},
        }
    ],
}
TEMPLATE = """{%- for tool in tools %}[{{ tool.function.name }}]{% endfor -%}
{%- for message in messages %}<{{ message.role }}>{{ message.content or "" -}}
{%- for call in message.tool_calls %}({{ call.function.name }}{{ call.function.arguments }})
{%- endfor %}</>{% endfor -%}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_their_calls(tokenizer, as_text):
    pytest.importorskip("jinja2", reason="templates are the extra `chat`")
    entry = CALLS | {"tools": json.dumps(CALLS["tools"]) if as_text else CALLS["tools"]}
    (example,) = data.from_record(entry, tokenizer, format=chat.Template(TEMPLATE))
    said = [chat.from_json(message) for message in CALLS["messages"]]
    template = chat.Template(TEMPLATE, tools=CALLS["tools"])
    expected = template.encode(tokenizer, said, answer=False)
    assert example.tokens.tolist() == expected
    assert "[lo]" in tokenizer.decode(example.tokens)
    answers = tokenizer.decode(learned(example))
    assert answers == "(lo{'hot': 'el'})</>hello hello</>"


def test_of_prompt_and_completion_the_completion_is_learned(tokenizer, tmp_path):
    entry = {"prompt": "hello", "completion": " hello lo"}
    (example,) = data.read(lines(tmp_path / "a.jsonl", entry), tokenizer)
    given = tokenizer.encode("hello")
    assert example.tokens[: len(given)].tolist() == given
    assert learned(example) == [
        *tokenizer.encode(" hello lo", bos=False),
        tokenizer.special.eos,
    ]
    assert tokenizer.decode(example.tokens) == "hello hello lo"


class Turns:
    """A format of two tokens before a turn and one after it, to see what is learned of it."""

    def __init__(self, forget: bool = False):
        self.forget = forget

    def encode(self, tokenizer, messages, *, answer=True):
        ids = [tokenizer.special.bos]
        for index, message in enumerate(messages):
            role = 5 if isinstance(message, chat.Assistant) else 6
            text = message.text
            if self.forget and isinstance(message, chat.Assistant) and index < len(messages) - 1:
                text = "lo"
            end = tokenizer.special.end_of_turn
            ids += [7, role, *tokenizer.encode(text, bos=False), end, 8]
        return [*ids, 7, 5] if answer else ids


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "hot"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello hello"},
        {"role": "user", "content": "lo"},
        {"role": "assistant", "content": "el"},
    ]
}


def test_of_a_conversation_answers_and_their_ends_are_learned(tokenizer, tmp_path):
    path = lines(tmp_path / "a.jsonl", CONVERSATION)
    (example,) = data.read(path, tokenizer, format=Turns())
    end = tokenizer.special.end_of_turn
    first, second = (tokenizer.encode(text, bos=False) for text in ("hello hello", "el"))
    assert learned(example) == [*first, end, *second, end]
    messages = [chat.from_json(entry) for entry in CONVERSATION["messages"]]
    spelled = Turns().encode(tokenizer, messages, answer=False)
    assert example.tokens.tolist() == spelled[:-1]


def test_where_answers_change_once_they_are_history_each_is_an_example(tokenizer, tmp_path):
    path = lines(tmp_path / "a.jsonl", CONVERSATION)
    first, second = data.read(path, tokenizer, format=Turns(forget=True))
    end = tokenizer.special.end_of_turn
    assert learned(first) == [*tokenizer.encode("hello hello", bos=False), end]
    assert learned(second) == [*tokenizer.encode("el", bos=False), end]
    assert "hello hello" not in tokenizer.decode(second.tokens)


BAD = {
    '{"text": "hel': "not JSON: .* at column",
    '["text"]': "expected an object, got a list",
    '"text"': "expected an object, got a text",
    '{"body": "x"}': "expected either 'text', .* got none of them",
    '{"text": "x", "messages": []}': "got 'text', 'messages'",
    '{"text": ""}': "'text' must be text that is not empty, got 'text': an empty text",
    '{"text": 3}': "got 'text': 3",
    '{"text": "\\ud800"}': "half of a surrogate pair",
    '{"prompt": "x"}': "'completion': nothing",
    '{"prompt": "x", "completion": ["x"]}': "'completion': a list",
    '{"prompt": [], "completion": ["x"]}': "or both a list of messages, got 'prompt': an empty",
    '{"text": "x", "messages": [1]}': "got 'text', 'messages'",
    '{"messages": [{"role": "assistant", "content": "x", "weight": 2}]}': "weight .* 0 or 1, got 2",
    '{"messages": [{"role": "user", "content": "x"}], "tools": {"a": 1}}': "'tools' must be a list",
    '{"messages": [{"role": "user", "content": "x"}], "tools": "x"}': "'tools' is text that is not",
    '{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}': "Turns cannot declare",
    '{"messages": []}': "must be a list that is not empty, got 'messages': an empty list",
    '{"messages": ["x"]}': "A message is an object with the role",
    '{"messages": [{"role": "user", "content": "x"}]}': "no message of the assistant",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "Message 1 must be a System or a User",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_by_its_number(tokenizer, tmp_path, line):
    path = lines(tmp_path / "a.jsonl", {"text": "hello"}, "", line)
    with pytest.raises(ValueError, match=f"a.jsonl:\nline 3: .*{BAD[line]}"):
        data.read(path, tokenizer, format=chat.Gemma() if "Message" in BAD[line] else Turns())


def test_all_bad_lines_are_named_at_once_up_to_ten(tokenizer, tmp_path):
    path = lines(tmp_path / "a.jsonl", *["{}" if n % 2 else {"text": "lo"} for n in range(30)])
    with pytest.raises(ValueError) as error:
        data.read(path, tokenizer)
    named = [line.split(":")[0] for line in str(error.value).splitlines()[1:]]
    assert named == [*(f"line {2 * n + 2}" for n in range(10)), "and 5 more"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\n\n", "the file has no lines"),
        ("a.txt", b" \n", "the file has no text"),
        ("a.jsonl", b"", "the file has no lines"),
        ("a.txt", b"\xef\xbb\xbf", "the file has no text"),
        ("a.txt", b"hello \xff", r"expected text in UTF-8; byte 6 is not \(line 1\)"),
        ("a.json", b'{"text": "lo"}\n{"text": "\xe4"}', r"byte 25 is not \(line 2\)"),
        ("a.txt", b"hello\n\0", r"not text: byte 6 is zero \(line 2\)"),
        ("a.jsonl", GZIPPED, "compressed with gzip: unpack it first"),
        ("a.jsonl.gz", GZIPPED, "compressed with gzip: unpack it first"),
        ("a.json", b"PK\x03\x04....", "a zip archive: unpack it first"),
        ("a.parquet", b"PAR1\x15\x04", "a Parquet file: write its rows as JSON lines"),
        ("a.jsonl", '{"text": "lo"}'.encode("utf-16"), "text in UTF-16: convert it to UTF-8"),
    ],
)
def test_a_file_without_text_is_refused(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read(path, tokenizer)


def test_a_folder_and_no_file_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="is a folder: name one of its files"):
        data.read(tmp_path, tokenizer)
    with pytest.raises(OSError, match="none.jsonl: there is no such file"):
        data.read(tmp_path / "none.jsonl", tokenizer)


def test_examples_become_batches(tokenizer, tmp_path):
    from equigemma import train

    path = lines(tmp_path / "a.jsonl", {"prompt": "hello", "completion": "lo"}, {"text": "hello"})
    ((batch, _),) = train.batches(data.read(path, tokenizer), length=64, rows=1, epochs=1)
    learned_targets = np.asarray(batch.targets)[np.asarray(batch.weights) > 0].tolist()
    completion = [*tokenizer.encode("lo", bos=False), tokenizer.special.eos]
    text = [*tokenizer.encode("hello", bos=False), tokenizer.special.eos]
    assert sorted(learned_targets) == sorted(completion + text)
