"""Files of texts as examples: what is learned, what is given, and which line is bad."""

import json

import numpy as np
import pytest

from equigemma import chat, data


gguf_files = pytest.importorskip("gguf_files", reason="GGUF files are written by the gguf library")
pytest.importorskip("sentencepiece", reason="the tokenizer is the extra `gguf`")

from equigemma.checkpoint import load  # noqa: E402


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


@pytest.mark.parametrize("name", ["a.txt", "README", "a.JSON"])
def test_any_other_file_is_one_text(tokenizer, tmp_path, name):
    path = tmp_path / name
    path.write_text("hello\n\nlöt {", encoding="utf-8")
    (example,) = data.read(path, tokenizer)
    assert tokenizer.decode(example.tokens) == "hello\n\nlöt {"
    assert example.tokens[-1] == tokenizer.special.eos


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
            role = 5 if isinstance(message, chat.Model) else 6
            text = message.text
            if self.forget and isinstance(message, chat.Model) and index < len(messages) - 1:
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
    '{"messages": []}': "must be a list that is not empty, got 'messages': an empty list",
    '{"messages": ["x"]}': "A message is an object with the role",
    '{"messages": [{"role": "user", "content": "x"}]}': "the model says nothing",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "Message 1 must be a System or User",
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
        ("a.txt", b"hello \xff", "expected text in UTF-8; byte 6 is not"),
    ],
)
def test_a_file_without_text_is_refused(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read(path, tokenizer)


def test_examples_become_batches(tokenizer, tmp_path):
    from equigemma import train

    path = lines(tmp_path / "a.jsonl", {"prompt": "hello", "completion": "lo"}, {"text": "hello"})
    ((batch, _),) = train.feed(data.read(path, tokenizer), length=64, rows=1, epochs=1)
    learned_targets = np.asarray(batch.targets)[np.asarray(batch.weights) > 0].tolist()
    completion = [*tokenizer.encode("lo", bos=False), tokenizer.special.eos]
    text = [*tokenizer.encode("hello", bos=False), tokenizer.special.eos]
    assert sorted(learned_targets) == sorted(completion + text)
