"""Images in conversations: the tokens and answers of one call that reads all of it at once."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny


pytest.importorskip("gguf_files", reason="the vocabulary is that of the tiny GGUF files")

import chat_models  # noqa: E402

import equigemma as eg  # noqa: E402
from equigemma import chat as ch  # noqa: E402
from equigemma import data, nn  # noqa: E402
from equigemma.chat import Assistant, Gemma, Gemma4, System, Template, User  # noqa: E402
from equigemma.chat._images import rest, with_images  # noqa: E402
from equigemma.chat._prefix_cache import restore_prefix  # noqa: E402
from equigemma.images import Picture  # noqa: E402
from equigemma.text import encode_image  # noqa: E402


SPECIAL = (*chat_models.GEMMA3, "<start_of_image>", "<end_of_image>", "<image_soft_token>")
TOKENIZER = chat_models.tokenizer(SPECIAL)
START, END = (TOKENIZER.encode(name, bos=False, special=True)[0] for name in SPECIAL[2:4])
NEWLINE = TOKENIZER.encode("\n\n", bos=False)[0]
VISION = tiny.replace(tiny.VISION, start=START, end=END, newline=NEWLINE)
MODEL = chat_models.model(tiny.seeing(tiny.GEMMA3, VISION), SPECIAL)
TAME = eg.sampling.make_sampler(
    temperature=2.0,
    forbid=sorted(set(range(TOKENIZER.vocab_size)) - set(TOKENIZER.encode("to", bos=False))),
)


def picture(seed: int = 0) -> np.ndarray:
    # The size that the tower takes: nothing is resized, so nothing is compiled for that.
    return np.random.default_rng(seed).integers(0, 256, (12, 12, 3)).astype(np.uint8)


ONE, TWO = picture(1), picture(2)


def special(text: str) -> list[int]:
    return TOKENIZER.encode(text, special=True)


def send(chat: eg.Chat, message, seed: int = 0) -> ch.Turn:
    turn = chat.stream(message, sampler=TAME, seed=seed, max_new_tokens=5)
    for _ in turn:
        pass
    return turn


def fresh(turn: ch.Turn, seed: int = 0) -> list[int]:
    """The answer of one call of `generate` that reads the conversation, its images inserted."""
    said = turn.chat.messages[:-1]
    ids = turn.chat.format.encode(TOKENIZER, said)
    images = [image for message in said if isinstance(message, User) for image in message.images]
    tokens = nn.insert_image_tokens(jnp.asarray(ids), VISION, len(images))
    generated = eg.sampling.generate(
        MODEL,
        tokens,
        soft_tokens=jnp.stack([encode_image(MODEL.vision, image) for image in images]),
        sampler=TAME,
        max_new_tokens=5,
        stop_tokens=ch.stop_tokens(TOKENIZER),
        key=jax.random.key(seed),
    )
    row = np.asarray(generated.tokens)
    return row[row >= 0].tolist()


@pytest.mark.slow
def test_a_turn_is_that_of_one_call_and_reads_what_is_new():
    first = send(eg.Chat(MODEL, TOKENIZER, capacity=256), User("hello", [ONE]))
    assert first.chat.messages[0].text == "<start_of_image>hello"
    held = first.prompt_tokens + len(first.new_tokens) - 1
    second = send(first.chat, User("tell<start_of_image>h", [TWO]), seed=1)
    assert second.read_tokens == second.prompt_tokens - held
    assert list(second.new_tokens) == fresh(second, seed=1)

    # Another image in the same place is another conversation; the same pixels are not.
    for image, known in [(ONE.copy(), held), (TWO, 0)]:
        said = [User("hello", [image]), *second.chat.messages[1:-1]]
        read = with_images(MODEL, Gemma().encode(TOKENIZER, said), said)
        assert restore_prefix(first.chat.prefix_cache, MODEL, 256, read.marks)[1] == known


def test_ids_are_those_of_insert_and_images_are_numbered_anew():
    said = [User("<start_of_image>a<start_of_image>", [ONE, TWO]), Assistant("o"), User("b", [TWO])]
    ids = Gemma().encode(TOKENIZER, said)
    read = with_images(MODEL, ids, said)
    assert read.ids == nn.insert_image_tokens(jnp.asarray(ids), VISION, 3).tolist()
    last = read.ids.index(-10)
    part, soft = rest(MODEL, read, last - 2)
    assert part[:8] == [NEWLINE, START, -2, -3, -4, -5, END, NEWLINE]
    np.testing.assert_array_equal(soft, [encode_image(MODEL.vision, TWO)])
    assert rest(MODEL, read, last + 4) == (read.ids[last + 4 :], None)
    whole, soft = rest(MODEL, read, 0)
    assert whole == read.ids and soft.shape == (3, 4, tiny.WIDTH)


# What the template of Gemma 3 does with a content that is a list, in our words.
TURNS = """{{ bos_token }}
{%- for message in messages -%}
    {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
    {%- if message.content is string -%}{{ message.content | trim }}{%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}{{ '<start_of_image>' }}
            {%- else -%}{{ part.text | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""


def test_ids_are_those_of_transformers(tmp_path):
    utils = pytest.importorskip(
        "transformers.utils.chat_template_utils", reason='needs pip install "equigemma[parity]"'
    )
    pytest.importorskip("jinja2", reason='needs pip install "equigemma[chat]"')
    image = pytest.importorskip("PIL.Image", reason="reading files is the extra `images`")
    path = str(tmp_path / "one.png")
    image.fromarray(ONE).save(path)
    entries = [
        {
            "role": "user",
            "content": [{"type": "image", "path": path}, {"type": "text", "text": "h"}],
        },
        {"role": "assistant", "content": "o"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "to"}, {"type": "image", "path": path}] * 2,
        },
    ]
    messages = [ch.from_json(entry) for entry in entries]
    assert [ch.to_json(message) for message in messages] == entries
    assert messages[0] == User("h", [Picture(ONE)]) != User("h", [TWO])
    rendered, _ = utils.render_jinja_template(
        [entries], chat_template=TURNS, add_generation_prompt=True, bos_token="<bos>"
    )
    expected = special(rendered[0].removeprefix("<bos>"))
    assert expected.count(START) == 3
    assert Gemma().encode(TOKENIZER, messages) == expected
    assert Template(TURNS).encode(TOKENIZER, messages) == expected

    # Their processor writes each image out as text before it is cut into tokens. Where a newline is
    # before it, as after the name of a role, it cuts three newlines in another way than DeepMind's
    # package and this one, to which the two of the image are ids.
    messages = [User("h<start_of_image>to<start_of_image>o", [ONE, TWO])]
    ids = Gemma().encode(TOKENIZER, messages)
    text = "<start_of_turn>user\nh<start_of_image>to<start_of_image>o<end_of_turn>\n"
    block = f"\n\n<start_of_image>{'<image_soft_token>' * 4}<end_of_image>\n\n"
    theirs = special(text.replace("<start_of_image>", block) + "<start_of_turn>model\n")
    soft = TOKENIZER.encode("<image_soft_token>", bos=False, special=True)[0]
    ours = with_images(MODEL, ids, messages).ids
    assert [soft if index < 0 else index for index in ours] == theirs


def test_what_is_said_never_becomes_an_image():
    said = [System("<start_of_image>"), User("<start_of_image>"), Assistant("<start_of_image>")]
    said.append(User("<start_of_image>", [ONE]))
    for format in (Gemma(), Template(TURNS)):
        messages = said if isinstance(format, Gemma) else said[1:]
        assert format.encode(TOKENIZER, messages).count(START) == 1


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: User("<start_of_image>", [ONE, TWO]), r"1 times, and 2 image\(s\) were given"),
        (lambda: User("h", [np.zeros((2, 2, 2, 2), np.uint8)]), "An image must be uint8"),
        (lambda: User("h", ["nowhere.png"]), "there is no such file"),
        (lambda: ch.to_json(User("h", [ONE])), "in no file cannot be written"),
        (lambda: ch.from_json({"role": "user", "content": [{"type": "video"}]}), "A part of a"),
        (
            lambda: ch.from_json(
                {"role": "user", "content": [{"type": "text", "text": "<start_of_image>"}]}
            ),
            "without <start_of_image>",
        ),
        (lambda: Gemma4().encode(TOKENIZER, [User("h", [ONE])]), "a model of text"),
        (
            lambda: data.from_messages([User("h", [ONE]), Assistant("o")], TOKENIZER),
            "it has images, and the model reads text only",
        ),
        (
            lambda: eg.Chat(MODEL, TOKENIZER, format=Template("{{ 'h' }}")).send(User("h", [ONE])),
            r"has 1 image\(s\), and the way it is written has places for 0",
        ),
        (
            lambda: eg.Chat(chat_models.model(tiny.GEMMA3, SPECIAL), TOKENIZER).send(
                User("h", [ONE])
            ),
            "this model reads text only: it has no vision tower",
        ),
    ],
)
def test_what_is_refused(made, says):
    with pytest.raises(ValueError, match=says):
        made()


def test_a_picture_stays_as_it_was():
    array = picture(3)
    kept = Picture(array)
    before = kept.rgb.copy()
    array[:] = 0
    np.testing.assert_array_equal(kept.rgb, before)
    assert kept == Picture(kept) == Picture(before) and kept != Picture(array)
    assert kept != Picture(before.reshape(6, 24, 3)) and len({kept, Picture(before)}) == 1


class Said:
    """In place of a `Chat`: takes every message and answers nothing."""

    def __init__(self, model, messages=()):
        self.model, self.messages = model, messages
        self.new_tokens = (1,)

    def stream(self, message, **options):
        return Turn(Said(self.model, (*self.messages, message)))


class Turn(list):
    """An answer without pieces."""

    def __init__(self, chat):
        self.chat, self.new_tokens = chat, (1,)


def test_the_command_line_shows_images(tmp_path):
    console = pytest.importorskip("rich.console", reason="the command line is the extra `cli`")
    image = pytest.importorskip("PIL.Image", reason="reading files is the extra `images`")
    from equigemma.cli._chat import _Session

    one, two = tmp_path / "one.png", tmp_path / "my two.png"
    image.fromarray(ONE).save(one)
    image.fromarray(TWO).save(two)
    out = io.StringIO()
    session = _Session(Said(MODEL), "tiny", console.Console(file=out, width=200), {}, 0)
    session.show(one)
    lines = ["hello", f"/image {two}", "/image", "/image nowhere.png", "h", "tell", f"/image {one}"]
    for line in [*lines, "/reset", "o"]:
        session.take(line)
        if line == "tell":
            said = session._chat.messages
    assert said == (User("hello", [ONE]), User("h", [TWO]), User("tell"))
    assert session._chat.messages == (User("o"),)
    for text in ("my two.png is shown with the next", "/image needs the name", "no such file"):
        assert text in out.getvalue()

    blind = _Session(
        Said(chat_models.model(tiny.GEMMA3, SPECIAL)), "tiny", console.Console(), {}, 0
    )
    with pytest.raises(ValueError, match="tiny reads text only: it has no vision tower"):
        blind.show(one)
