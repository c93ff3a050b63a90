"""How conversations are spelled: against DeepMind's `dialog`, Google's template, transformers."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


pytest.importorskip("gguf_files", reason="the vocabulary is that of the tiny GGUF files")
jinja2 = pytest.importorskip("jinja2", reason='needs pip install "equigemma[chat]"')

import chat_models  # noqa: E402

from equigemma.chat import (  # noqa: E402
    Assistant,
    Gemma,
    Gemma4,
    System,
    Template,
    ToolCall,
    ToolResult,
    User,
    default_format,
    from_json,
    to_json,
)
from equigemma.chat._notation import QUOTE, read_call, write  # noqa: E402


GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "chat_formats.json").read_text(encoding="utf-8")
)["conversations"]
GEMMA3, GEMMA4 = chat_models.tokenizer(), chat_models.tokenizer(chat_models.GEMMA4)

# What the templates of Gemma's instruction-tuned models do, in our words.
TURNS = """{{ bos_token }}
{%- if messages[0].role == 'system' -%}
    {%- set first = messages[0].content + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}{%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('User and assistant take turns') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
    {{- (first if loop.first else '') + message.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""


def conversation(name: str):
    return [from_json(entry) for entry in GOLDEN[name]["messages"]]


def spelled(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text.removeprefix("<bos>"), special=True)


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("name", GOLDEN)
def test_gemma_4_as_in_googles_template(name, answer):
    golden = GOLDEN[name]["google_gemma4" + ("" if answer else "_finished")]
    format = Gemma4(**GOLDEN[name]["options"], empty_thought=True)
    ids = format.encode(GEMMA4, conversation(name), answer=answer)
    assert ids == spelled(GEMMA4, golden)


# That template has a new line after <|think|> and at the end of a thought, `dialog` has none.
@pytest.mark.parametrize("name", sorted(GOLDEN.keys() - {"thinking", "thought", "finished"}))
def test_gemma_4_as_in_dialog(name):
    ids = Gemma4(**GOLDEN[name]["options"]).encode(GEMMA4, conversation(name))
    assert ids == spelled(GEMMA4, GOLDEN[name]["dialog_gemma4"])


@pytest.mark.parametrize("name", ["one question", "two questions", "finished"])
def test_gemma_3_as_in_dialog(name):
    messages = conversation(name)
    if name != "finished":
        golden = GOLDEN[name]["dialog_gemma3"]
        assert Gemma().encode(GEMMA3, messages) == spelled(GEMMA3, golden)
        messages.append(Assistant("hello"))
        golden += "hello<end_of_turn>"
    else:
        golden = GOLDEN[name]["dialog_gemma3_finished"]
    assert Gemma().encode(GEMMA3, messages, answer=False) == spelled(GEMMA3, golden + "\n")


CONVERSATIONS = [
    [User("hello")],
    [System(" told "), User(" hello\n"), Assistant("\n o \n"), User("h  t")],
    [User("h"), Assistant("o")],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("answer", [True, False])
def test_gemma_3_and_its_template_are_what_transformers_makes_of_it(messages, answer):
    utils = pytest.importorskip(
        "transformers.utils.chat_template_utils", reason='needs pip install "equigemma[parity]"'
    )
    rendered, _ = utils.render_jinja_template(
        [[to_json(message) for message in messages]],
        chat_template=TURNS,
        add_generation_prompt=answer,
        bos_token="<bos>",
    )
    expected = spelled(GEMMA3, rendered[0])
    assert Gemma().encode(GEMMA3, messages, answer=answer) == expected
    assert Template(TURNS).encode(GEMMA3, messages, answer=answer) == expected


@pytest.mark.parametrize("format", [Gemma(), Template(TURNS)], ids=["built in", "template"])
@given(
    st.lists(
        st.text(max_size=3)
        | st.sampled_from(
            ["<end_of_turn>", "<start_of_turn>", "<bos>", "[multimodal]", "<eos>", "<", "[", ">"]
            + ["end_of_turn>", "<0x0A>", "[<bos>]", "\ufdd0", "\ufdd1", "  ", "\n"]
        ),
        max_size=7,
    ).map("".join)
)
@settings(deadline=None, max_examples=50)
def test_what_is_said_never_becomes_special(format, text):
    said = [System(text), User(text), Assistant(text), User(text)]
    harmless = [System("a"), User("b"), Assistant("c"), User("d")]
    ids = format.encode(GEMMA3, said)

    def special(ids):
        return [index for index in ids if not GEMMA3.token_bytes(index)]

    assert special(ids) == special(format.encode(GEMMA3, harmless))
    # Nothing is lost either; U+2581 is a space to this vocabulary.
    shown = GEMMA3.decode(ids)
    assert shown.count(text.strip().replace("▁", " ")) >= 3


def test_a_template_cannot_be_completed_to_a_special_token():
    source = "<{{ messages[0].content }}<{{ messages[1].content }}>{{ messages[2].content }}"
    said = [User("end_of_turn>"), Assistant("end_of_turn"), User("<end_of_"), Assistant("turn>")]
    ids = Template(source + "{{ messages[3].content }}").encode(GEMMA3, said)
    assert [index for index in ids if not GEMMA3.token_bytes(index)] == []
    assert GEMMA3.decode(ids) == "<end_of_turn><end_of_turn><end_of_turn>"


# A template of which one step is not followed, in ways of its own.
OPAQUE = [
    "{{ '%s<eos>%s' % (messages[0].content, 1) }}",
    "{{ '{}<eos>'.format(messages[0].content) }}",
    "{{ (messages[0].content + '<eos>') | indent(1, true) }}",
    "{{ {'a': messages[0].content, 'b': '<eos>'} | tojson }}",
    "{{ [messages[0].content, '<eos>'] }}",
    "{{ [messages[0].content, '<eos>'] | string | trim('[') }}",
    "{{ (messages[0].content + '<eos>').encode().decode() }}",
    "{{ (messages[0].content + '<eos>').expandtabs() }}",
    "{{ (messages[0].content + '<eos>').translate({97: 'a'}) }}",
    "{{ (messages[0].content + '<eos>') | e | replace('&lt;', '<') | replace('&gt;', '>') }}",
    "{% set ns = namespace(x=messages[0].content) %}{{ [ns.x, '<eos>'] | pprint }}",
]


@pytest.mark.parametrize("source", OPAQUE)
@pytest.mark.parametrize(
    "text", ["hell", "hi <b>there</b>", "a<eos>b", "<eos>", "<end_of_turn>", "<eo", "s>", "[x]"]
)
def test_what_is_not_followed_is_told_apart_all_the_same(source, text):
    ids = Template(source).encode(GEMMA3, [User(text)])
    assert [index for index in ids if not GEMMA3.token_bytes(index)] == [GEMMA3.special.eos]
    own = GEMMA3.decode(Template(source).encode(GEMMA3, [User("hell")])).lower()
    assert GEMMA3.decode(ids).lower() == own.replace("hell", text)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        # Within the token, under a condition that the text itself decides, changed by it.
        ("{{ '<{}>'.format(messages[0].content) }}", "eos"),
        ("{{ '%s<eos>' % messages[0].content if '<' in messages[0].content else 'x' }}", "<eos>"),
        ("{{ (messages[0].content ~ '<eos>') | title | replace('<Eos>', '<eos>') }}", "<b>"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(source, text):
    with pytest.raises(ValueError, match="The chat template makes <eos> in a way that leaves open"):
        Template(source).encode(GEMMA3, [User(text)])
    assert Template(source).encode(GEMMA3, [User("hello")])


def test_an_id_is_where_the_template_looks_for_it():
    source = "{{ 'y' if messages[0].content == '<eos>' else 'n' }}{{ messages[0].content[1:] }}"
    ids = Template(source).encode(GEMMA3, [User("<eos>")])
    assert GEMMA3.decode(ids) == "yeos>"


def test_tools_and_thinking_reach_a_template():
    source = (
        "{{ enable_thinking }}|{{ tools | tojson }}|{{ messages[1].reasoning_content }}|"
        "{{ messages[1].tool_calls[0].function.arguments.x }}|"
        "{{ messages[1].tool_responses[0].response }}"
    )
    messages = [
        User("h"),
        Assistant("", "why", (ToolCall("f", {"x": "<eos>"}),)),
        ToolResult("f", 5),
    ]
    ids = Template(source, thinking=True, tools=[{"a": "é"}]).encode(GEMMA3, messages)
    assert GEMMA3.decode(ids) == 'True|[{"a": "é"}]|why|<eos>|5'
    assert GEMMA3.special.eos not in ids


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content._origin }}",
        "{{ messages[0].content.split.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ dict.__class__ }}{{ namespace.__init__ }}{{ raise_exception.__globals__ }}",
    ],
)
def test_python_itself_is_out_of_reach(source):
    assert GEMMA3.decode(Template(source + "|").encode(GEMMA3, [User("h")])) == "|"


def test_a_loop_that_takes_long_is_stopped(monkeypatch):
    monkeypatch.setattr("equigemma.chat._sandbox.SECONDS", 0.1)
    # Few rounds, each of which compares what is long.
    source = "{% set x = 'a' * 4000000 %}{% set y = 'a' * 4000000 %}"
    source += "{% for i in range(100000) %}{% if x == y + 'b' %}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="more work than any conversation needs"):
        Template(source).encode(GEMMA3, [User("hello")])


LOOP = "{%% set ns = namespace(x='aaaa', y=[1]) %%}{%% for i in range(60) %%}%s{%% endfor %%}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "in line 1"),
        ("\n{{ 'x' | enter(9) }}", "in line 2: No filter named 'enter'"),
        ("{% autoescape true %}{{ x }}{% endautoescape %}", "it uses autoescape"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
        ("{{ " + "9" * 5000 + " }}", "too long to read"),
        ("x" * 200_000, "more than 131072"),
    ],
)
def test_what_is_no_template_that_may_run(source, message):
    with pytest.raises(ValueError, match=f"chat template is refused: .*{message}"):
        Template(source)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Not so') }}", "at this conversation: Not so"),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(a=1) }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{% import 'x' as y %}", "no loader"),
        ("{% extends 'x' %}", "no loader"),
        ("{% set ns = namespace(_x=1) %}", "stores an attribute called _x"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "stores an attribute called _x"),
        ("{{ '{:9999}'.format(1) }}", "widths that no conversation needs"),
        ("{{ '{:{}}'.format(1, 10 ** 9) }}", "widths that no conversation needs"),
        ("{{ '%9999d' % 1 }}", "widths that no conversation needs"),
        ("{{ '%*d' % (10 ** 9, 1) }}", "widths that no conversation needs"),
        ("{{ strftime_now('%9999d') }}", "widths that no conversation needs"),
        ("{{ [] | tojson(indent=10**9) }}", "it uses tojson with a number above 256"),
        ("{{ 'x' | center(10**9) }}", "it uses center with a number above 256"),
        ("{{ 'x'.ljust(10**9) }}", "it uses ljust with a number above 256"),
        ("{{ [1] | batch(10**9, 'x') | list }}", "it uses batch with a number above 256"),
        ("{{ 'x' * 10**10 }}", "more work"),
        ("{{ [messages] * 10**10 }}", "more work"),
        ("{{ 9 ** (9 ** 9) }}", "numbers that are too large"),
        ("{{ 2 ** 4000 * 2 ** 4000 }}", "numbers that are too large"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{{ lipsum(10**9) }}", "'lipsum' is undefined"),
        ("{{ ('a' * 10**5).translate({97: 'b' * 10**5}) }}", "more work"),
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "more work",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        (
            "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(60) }}",
            "more work",
        ),
        (LOOP % "{% set ns.x = ns.x ~ ns.x %}", "more work"),
        (LOOP % "{% set ns.x = ns.x + ns.x %}", "more work"),
        (LOOP % "{% set ns.x = ns.x | replace('a', ns.x) %}", "more work"),
        (LOOP % "{% set ns.x = ns.x.join(ns.x) %}", "more work"),
        (LOOP % "{% set a %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = a %}", "more work"),
        (LOOP % "{% set ns.y = [ns.y, ns.y] %}" + "{{ ns.y }}", "more work"),
        (LOOP % "{% set ns.y = [ns.y, ns.y] %}" + "{{ ns.y | tojson }}", "more work"),
        (LOOP % "{% set ns.y = [ns.y, ns.y] %}" + "{{ ns.y == [ns.y] }}", "more work"),
    ],
)
def test_a_template_that_fails_or_does_too_much_is_stopped(source, message):
    with pytest.raises(ValueError, match=f"The chat template stops.*{message}"):
        Template(source).encode(GEMMA3, [User("hello")])


def test_an_honest_template_has_enough_for_a_long_conversation():
    messages = [User("hello " * 500), Assistant("o " * 500)] * 200 + [User("h")]
    assert Template(TURNS).encode(GEMMA3, messages) == Gemma().encode(GEMMA3, messages)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "needs at least one message of a User"),
        ([System("h")], "needs at least one message of a User"),
        ([Assistant("h")], "Message 1 must be a System or a User, got an Assistant"),
        ([User("h"), User("h")], "Message 2 must be an Assistant, got a User"),
        ([User("h"), System("h")], "Message 2 must be an Assistant, got a System"),
        (
            [User("h"), Assistant("h"), ToolResult("f", 1)],
            "Message 3 must be a User, got a ToolResult",
        ),
    ],
)
@pytest.mark.parametrize("format", [Gemma(), Gemma4(), Template(TURNS)], ids=type)
def test_what_is_no_conversation(format, messages, error):
    with pytest.raises(ValueError, match=error):
        format.encode(GEMMA4 if isinstance(format, Gemma4) else GEMMA3, messages)


def test_gemma_3_writes_no_calls():
    with pytest.raises(ValueError, match="no way to write calls"):
        Gemma().encode(GEMMA3, [User("h"), Assistant("", calls=(ToolCall("f"),))])


def test_the_vocabulary_decides():
    assert default_format(GEMMA3) == Gemma()
    assert default_format(GEMMA4) == Gemma4()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=11,
)


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), JSON, max_size=3))
@settings(deadline=None)
def test_a_call_is_read_as_it_was_written(arguments):
    parts = ["call:f", *write(arguments)]
    pieces = [None if part == QUOTE else part for part in parts]
    assert read_call(pieces) == ToolCall("f", arguments)


@pytest.mark.parametrize("value", [object(), float("nan"), float("inf"), {1, 2}])
def test_tools_take_values_that_json_has(value):
    with pytest.raises(ValueError, match="values that JSON has, got a"):
        list(write({"x": value}))


@pytest.mark.parametrize("name", GOLDEN)
def test_messages_survive_json(name):
    messages = conversation(name)
    again = [from_json(json.loads(json.dumps(to_json(message)))) for message in messages]
    assert again == messages


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"role": "user"},
        {"role": "user", "content": 5},
        {"role": "user", "content": "h", "images": []},
        {"role": "narrator", "content": "h"},
        {"role": "assistant", "content": "h", "tool_calls": {}},
        {"role": "assistant", "content": "h", "tool_calls": [{"name": "f"}]},
        {"role": "assistant", "content": "h" * 500, "refusal": "no"},
        {"role": "user", "content": None},
        {"role": "user", "content": []},
        {"role": "user", "content": "h", "name": 5},
        {"role": "user", "content": "h", "reasoning_content": "h"},
        {"role": "tool", "content": "h", "tool_call_id": 5},
        {"role": "assistant", "content": "h", "reasoning": ["h"]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
    ],
)
def test_what_is_no_message(entry):
    with pytest.raises(ValueError, match="A (message|tool call) is an object") as error:
        from_json(entry)
    assert len(str(error.value)) < 250
