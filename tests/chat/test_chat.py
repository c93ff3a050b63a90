"""Conversations: the same tokens as a fresh start, however little is read again."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny


pytest.importorskip("gguf_files", reason="the vocabulary is that of the tiny GGUF files")

import chat_models  # noqa: E402

import equigemma as eg  # noqa: E402
from equigemma import chat as ch  # noqa: E402
from equigemma.chat import Assistant, Gemma, Gemma4, System, ToolCall, ToolResult, User  # noqa: E402
from equigemma.chat._response_parser import ResponseParser  # noqa: E402
from equigemma.nn import Block  # noqa: E402


class Counting(eqx.Module):
    """A layer that counts the tokens it sees; padding has position −1."""

    block: Block
    count: list[int] = eqx.field(static=True)

    def __call__(self, x, queries, *rest):
        jax.debug.callback(lambda p: self.count.append(int((p >= 0).sum())), queries.positions)
        return self.block(x, queries, *rest)


SEEN: list[int] = []
RINGS = chat_models.model(tiny.GEMMA3)
RINGS = eqx.tree_at(lambda m: m.layers[0], RINGS, Counting(RINGS.layers[0], SEEN))
TOKENIZER = chat_models.tokenizer()
# Drawn at this temperature, a tiny model spells bytes that are no text, and text that a tokenizer
# spells otherwise: the hard case for what was read before.
WILD = eg.sampling.make_sampler(temperature=2.0)
# A text of these letters is spelled in one way only.
TAME = eg.sampling.make_sampler(
    temperature=2.0,
    forbid=sorted(set(range(TOKENIZER.vocab_size)) - set(TOKENIZER.encode("to", bos=False))),
)


def start(model: eg.Transformer = RINGS, **options) -> eg.Chat:
    return eg.Chat(model, TOKENIZER, capacity=256, **options)


def send(chat: eg.Chat, message, sampler=WILD, seed: int = 0, **options) -> ch.Turn:
    """A turn that has come to its end."""
    turn = chat.stream(message, sampler=sampler, seed=seed, **({"max_new_tokens": 7} | options))
    for _ in turn:
        pass
    return turn


def fresh(turn: ch.Turn, sampler=WILD, seed: int = 0) -> list[int]:
    """The answer of a model that reads the whole conversation at once."""
    chat = turn.chat
    ids = chat.format.encode(TOKENIZER, chat.messages[:-1])
    generated = eg.sampling.generate(
        chat.model,
        jnp.asarray(ids),
        sampler=sampler,
        max_new_tokens=7,
        stop_tokens=ch.stop_tokens(TOKENIZER),
        key=jax.random.key(seed),
    )
    row = np.asarray(generated.tokens)
    return row[row >= 0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [WILD, TAME], ids=["wild", "tame"])
def test_each_turn_is_that_of_a_fresh_start(sampler):
    chat = start(system="hello")
    for seed, message in enumerate(["h", "to <b>tell</b>", "hotel"]):
        turn = send(chat, message, sampler, seed)
        assert list(turn.new_tokens) == fresh(turn, sampler, seed)
        chat = turn.chat
    kinds = [type(message) for message in chat.messages]
    assert kinds == [System, User, Assistant, User, Assistant, User, Assistant]


@pytest.mark.slow
def test_a_model_without_rings_reads_from_the_first_difference_on():
    chat = start(chat_models.model(tiny.GEMMA1_MHA))
    first = send(chat, "hello")
    second = send(first.chat, "h")
    held = first.chat.prefix_cache
    assert held is not None
    ids = chat.format.encode(TOKENIZER, second.chat.messages[:-1])
    same = [ours == theirs for ours, theirs in zip(held.ids, ids, strict=False)]
    # The answer was no text, so that it is spelled otherwise now.
    assert same.index(False) >= first.prompt_tokens
    assert second.read_tokens == len(ids) - same.index(False)
    assert list(second.new_tokens) == fresh(second)


def test_a_turn_sends_only_what_is_new_through_the_model():
    chat, held = start(), 0
    for seed, message in enumerate(["hello", "h", "tell"]):
        jax.effects_barrier()
        SEEN.clear()
        turn = send(chat, message, TAME, seed)
        jax.effects_barrier()
        ids = chat.format.encode(TOKENIZER, turn.chat.messages[:-1])
        assert turn.prompt_tokens == len(ids)
        assert turn.read_tokens == len(ids) - held
        # All new tokens but the last come back as input.
        assert sum(SEEN) == turn.read_tokens + len(turn.new_tokens) - 1
        chat, held = turn.chat, len(ids) + len(turn.new_tokens) - 1
    assert held > 60


def test_turns_of_one_bucket_are_traced_once():
    traces = []

    class Watched(eg.sampling.AbstractSampler):
        def __call__(self, logits, tokens, key):
            traces.append(logits.shape)
            return TAME(logits, tokens, key)

    chat, counts = start(chat_models.model(tiny.GEMMA3)), []
    for seed, message in enumerate(["hello", "h", "tell", "hotel"]):
        turn = send(chat, message, Watched(), seed, max_new_tokens=3 + seed)
        # No prompt is longer than the smallest bucket.
        assert 1 < turn.read_tokens <= 32
        chat = turn.chat
        counts.append(len(traces))
    assert counts[0] > 0
    assert counts == 4 * counts[:1]


def test_rings_go_back_to_where_the_last_turn_began():
    first = send(start(), "hello", TAME)
    second = send(first.chat, "h")
    third = send(second.chat, "tell")
    held = first.prompt_tokens + len(first.new_tokens) - 1
    assert second.read_tokens == second.prompt_tokens - held
    # The wild answer is spelled otherwise as history. All before that turn is not read again.
    assert third.read_tokens == third.prompt_tokens - held
    assert list(third.new_tokens) == fresh(third)


def test_one_conversation_goes_on_in_two_ways():
    root = send(start(), "hello", TAME).chat
    before = root.messages
    one, two = send(root, "h", TAME), send(root, "tell", TAME)
    again = send(root, "h", TAME)
    assert one.new_tokens == again.new_tokens
    assert list(two.new_tokens) == fresh(two, TAME)
    assert root.messages == before
    assert one.chat.messages[:-2] == two.chat.messages[:-2] == before


def test_an_answer_that_was_broken_off_is_kept_as_far_as_it_came():
    turn = start().stream("hello", sampler=TAME, seed=3, max_new_tokens=7)
    pieces = [next(turn).text for _ in range(3)]
    halfway = turn.chat
    assert halfway.messages == (User("hello"), Assistant("".join(pieces)))
    following = send(halfway, "h", TAME)
    assert following.read_tokens < following.prompt_tokens
    assert list(following.new_tokens) == fresh(following, TAME)


def test_an_answer_that_goes_on_takes_the_memory_of_its_beginning():
    turn = start().stream("hello", sampler=TAME, max_new_tokens=7)
    next(turn)
    halfway = turn.chat
    for _ in turn:
        pass
    following = send(halfway, "h", TAME)
    assert following.read_tokens == following.prompt_tokens
    assert list(following.new_tokens) == fresh(following, TAME)


def test_pieces_join_to_the_reply():
    options = {"sampler": TAME, "max_new_tokens": 7}
    chat, reply = start().send("hello", **options)
    pieces = list(start().stream("hello", **options))
    assert "".join(piece.text for piece in pieces) == reply == chat.messages[-1].text
    assert {piece.kind for piece in pieces} == {"text"}


def test_a_stop_string_ends_an_answer_and_is_not_in_it():
    reply = start().send("hello", sampler=TAME, max_new_tokens=7).reply
    stop = reply[2:4]
    chat, cut = start().send("hello", sampler=TAME, max_new_tokens=7, stop_strings=[stop])
    assert cut == reply[: reply.index(stop)]
    following = send(chat, "h", TAME)
    assert list(following.new_tokens) == fresh(following, TAME)


def test_the_answer_ends_where_the_room_does():
    prompt = len(Gemma().encode(TOKENIZER, [User("hello")]))
    chat = eg.Chat(RINGS, TOKENIZER, capacity=prompt + 2)
    turn = chat.stream("hello", sampler=TAME, seed=3, max_new_tokens=50)
    assert len(list(turn)) == len(turn.new_tokens) == 3
    with pytest.raises(
        ValueError, match=rf"{prompt} tokens.*capacity of {prompt - 1}: begin a new"
    ):
        eg.Chat(RINGS, TOKENIZER, capacity=prompt - 1).send("hello")


def test_a_memory_serves_a_changed_conversation_with_the_same_model_only():
    chat = send(send(start(), "hello", TAME).chat, "h", TAME).chat
    options = {"messages": chat.messages[:2], "prefix_cache": chat.prefix_cache}
    edited = send(start(**options), "tell", TAME)
    assert 0 < edited.read_tokens < edited.prompt_tokens
    assert list(edited.new_tokens) == fresh(edited, TAME)
    other = send(start(chat_models.model(tiny.GEMMA1_MHA), **options), "tell", TAME)
    assert other.read_tokens == other.prompt_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity of at least one token, got capacity=0"),
        ({"system": "h", "messages": [System("o")]}, "leave out `system`"),
    ],
)
def test_what_is_no_chat(options, message):
    with pytest.raises(ValueError, match=message):
        eg.Chat(RINGS, TOKENIZER, **options)


@pytest.mark.parametrize(
    ("sent", "options", "message"),
    [
        ("h", {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ("h", {"temperature": 1.0, "sampler": TAME}, "put the temperature into the sampler"),
        ("h", {"temperature": -1.0}, "above 0, got -1"),
        (System("h"), {}, "Message 2 must be an Assistant, got a System"),
        ([], {}, "at least one"),
    ],
)
def test_what_cannot_be_sent(sent, options, message):
    chat = start(
        messages=[] if sent == [] else [User("h"), Assistant("o")][: 1 if sent != "h" else 2]
    )
    with pytest.raises(ValueError, match=message):
        chat.send(sent, **options)


def test_a_vocabulary_without_turns_needs_a_format():
    tokenizer = chat_models.tokenizer(("<|think|>",))
    with pytest.raises(ValueError, match="neither <start_of_turn> nor <|turn>.*pass a format"):
        eg.Chat(RINGS, tokenizer)
    with pytest.raises(ValueError, match="needs the special token <start_of_turn>"):
        eg.Chat(RINGS, tokenizer, format=Gemma()).send("h")


GEMMA4 = chat_models.tokenizer(chat_models.GEMMA4)


def read(text: str, *stop_strings: str) -> tuple[Assistant, list[ch.Piece]]:
    reader = ResponseParser(GEMMA4, stop_strings)
    pieces = [reader.push(index) for index in GEMMA4.encode(text, bos=False, special=True)]
    pieces.append(reader.finish())
    return reader.message(), pieces


def test_thoughts_and_calls_are_told_from_the_text():
    message, pieces = read(
        "<|channel>thought\nhm, é\n<channel|>hello <|tool_call>call:look{at:[1,2.5,-3],"
        'by:{deep:true,x:null},for:<|"|>a "b", {c}<|"|>}<tool_call|>!<turn|>'
    )
    arguments = {"at": [1, 2.5, -3], "by": {"deep": True, "x": None}, "for": 'a "b", {c}'}
    assert message == Assistant("hello !", "hm, é", (ToolCall("look", arguments),))
    assert "".join(piece.text for piece in pieces if piece.kind == "text") == "hello !"
    assert "".join(p.text for p in pieces if p.kind == "thinking") == "thought\nhm, é\n"


@pytest.mark.parametrize(
    "call",
    ["", "call:", "call:f", "call:f{", "call:f{a}", "call:f{a:b}", "call:f{a:1}}", "f{a:1}"]
    + ["call:f[1]", "call:f{a:NaN,}", "call:f" + "{a:" * 5000],
)
def test_what_is_no_call_is_text(call):
    message, _ = read(f"h<|tool_call>{call}<tool_call|>o")
    assert message == Assistant(f"h{call}o")


def test_a_stop_string_is_looked_for_in_the_text_alone():
    message, _ = read("<|channel>thought\nno stop\n<channel|>do stop now", "stop")
    assert message == Assistant("do ", "no stop")


def test_a_tool_is_called_and_answers():
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks."}}]
    model = chat_models.model(special=chat_models.GEMMA4)
    called = [User("hello"), Assistant("", "h", (ToolCall("look", {"at": 7}),))]
    chat = eg.Chat(model, GEMMA4, format=Gemma4(tools=tools, thinking=True), messages=called)
    turn = chat.stream(ToolResult("look", {"seen": ["o"]}), max_new_tokens=3)
    for _ in turn:
        pass
    assert turn.chat.messages[:3] == (*called, ToolResult("look", {"seen": ["o"]}))
    ids = chat.format.encode(GEMMA4, turn.chat.messages[:-1])
    assert ids == GEMMA4.encode(
        "<|turn>system\n<|think|>\n<|tool>declaration:look{description:"
        '<|"|>Looks.<|"|>}<tool|><turn|>\n<|turn>user\nhello<turn|>\n<|turn>model\n'
        "<|channel>thought\nh\n<channel|><|tool_call>call:look{at:7}<tool_call|>"
        '<|tool_response>response:look{seen:[<|"|>o<|"|>]}<tool_response|>',
        special=True,
    )
    names = ("<|tool_response>", "<turn|>")
    ends = {GEMMA4.encode(name, bos=False, special=True)[0] for name in names}
    assert ends < set(ch.stop_tokens(GEMMA4))


def test_a_chat_prints_as_one_line():
    assert repr(start(messages=[User("h")])) == "Chat(1 message, Gemma())"


# An answer of which the beginning is given.


@pytest.mark.parametrize("prefill", ["to", "  hell to \n", "hello the hotel"])
def test_the_model_goes_on_with_what_is_given(prefill):
    turn = send(start(system="hot"), "hello", TAME, prefill=prefill)
    begun = prefill.strip()
    ids = Gemma().encode(
        TOKENIZER,
        [System("hot"), User("hello"), Assistant(prefill)],
        continue_final_message=True,
    )
    assert ids == TOKENIZER.encode(
        f"<start_of_turn>user\nhot\n\nhello<end_of_turn>\n<start_of_turn>model\n{begun}",
        special=True,
    )
    generated = eg.sampling.generate(
        RINGS,
        jnp.asarray(ids),
        sampler=TAME,
        max_new_tokens=7,
        stop_tokens=ch.stop_tokens(TOKENIZER),
        key=jax.random.key(0),
    )
    expected = [index for index in np.asarray(generated.tokens).tolist() if index >= 0]
    assert list(turn.new_tokens) == expected
    assert turn.chat.messages[-1] == Assistant(begun + TOKENIZER.decode(expected))
    following = send(turn.chat, "h", TAME, 1)
    assert list(following.new_tokens) == fresh(following, TAME, 1)
    assert following.read_tokens < following.prompt_tokens


def test_pieces_begin_with_what_was_given():
    options = {"sampler": TAME, "max_new_tokens": 5, "prefill": " hot "}
    chat, reply = start().send("hello", **options)
    turn = start().stream("hello", **options)
    pieces = list(turn)
    assert pieces[0] == ch.Piece("hot") and len(pieces) == 6
    assert "".join(piece.text for piece in pieces) == reply == chat.messages[-1].text
    # Of white space alone, nothing is given.
    assert start().send("hello", **options | {"prefill": " "}).reply == (
        start().send("hello", **options | {"prefill": ""}).reply
    )


def test_gemma_4_goes_on_with_an_answer():
    messages = [
        User("h"),
        Assistant("", calls=(ToolCall("f"),)),
        ToolResult("f", 1),
        Assistant(" he "),
    ]
    ids = Gemma4(empty_thought=True).encode(GEMMA4, messages, continue_final_message=True)
    assert GEMMA4.decode(ids).endswith("response:f{value:1}he")
    ids = Gemma4().encode(GEMMA4, [User("h"), Assistant(" he ")], continue_final_message=True)
    assert ids == GEMMA4.encode("<|turn>user\nh<turn|>\n<|turn>model\nhe", special=True)


@pytest.mark.parametrize("format", [Gemma(), Gemma4(), ch.Template("{{ messages[-1].content }}")])
@pytest.mark.parametrize(
    ("messages", "got"),
    [
        ([User("h")], "got a User"),
        ([User("h"), Assistant("", calls=(ToolCall("f"),))], "got an Assistant with calls"),
    ],
)
def test_what_the_model_cannot_go_on_with(format, messages, got):
    tokenizer = GEMMA4 if isinstance(format, Gemma4) else TOKENIZER
    with pytest.raises(
        ValueError, match=f"the last message must be an Assistant without calls.*{got}"
    ):
        format.encode(tokenizer, messages, continue_final_message=True)


def test_a_template_that_does_not_write_the_last_message():
    template = ch.Template("{{ messages[-1].content | upper }}")
    with pytest.raises(ValueError, match="does not write the last message as it is"):
        template.encode(TOKENIZER, [User("h"), Assistant("hot")], continue_final_message=True)
