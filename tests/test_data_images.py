"""Conversations about images as examples and batches: what is learned, and which line is bad."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma import data, train
from equigemma.images import as_rgb


pytest.importorskip("gguf_files", reason="the vocabulary is that of the tiny GGUF files")
pillow = pytest.importorskip("PIL.Image", reason="images are files, which Pillow reads")

import chat_models  # noqa: E402


SPECIAL = (*chat_models.GEMMA3, "<start_of_image>", "<end_of_image>")
TOKENIZER = chat_models.tokenizer(SPECIAL)
START, END = (TOKENIZER.encode(name, bos=False, special=True)[0] for name in SPECIAL[2:])
NEWLINE = TOKENIZER.encode("\n\n", bos=False)[0]
VISION = tiny.replace(tiny.VISION, start=START, end=END, newline=NEWLINE)
SOFT = VISION.num_soft_tokens + 3


def shown(*parts, answer="lo") -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}, said("assistant", answer)]}


def said(role: str, text) -> dict:
    return {"role": role, "content": text}


def text(said: str) -> dict:
    return {"type": "text", "text": said}


def image(path: str, key: str = "path") -> dict:
    return {"type": "image", key: path}


@pytest.fixture
def folder(tmp_path):
    """Three images, none of the size that the tower takes, and no data yet."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(3):
        pixels = rng.integers(0, 256, (7, 11, 3)).astype(np.uint8)
        pillow.fromarray(pixels).save(tmp_path / f"images/{index}.png")
    return tmp_path


def write(folder, *entries):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_conversation_keeps_the_paths_of_its_images(folder):
    entry = shown(text("h"), image("images/0.png"), text("el"), image("images/2.png", "image"))
    entry["messages"] += [said("user", "hello"), said("assistant", [text("h"), text("ot")])]
    (example,) = data.read(write(folder, entry), TOKENIZER, vision=VISION)
    spelled = (
        "<start_of_turn>user\nh<start_of_image>el<start_of_image><end_of_turn>\n"
        "<start_of_turn>model\nlo<end_of_turn>\n<start_of_turn>user\nhello<end_of_turn>\n"
        "<start_of_turn>model\nhot<end_of_turn>"
    )
    assert example.tokens.tolist() == TOKENIZER.encode(spelled, special=True)
    assert example.images == tuple(str(folder / f"images/{index}.png") for index in (0, 2))
    end = TOKENIZER.special.end_of_turn
    learned = [*TOKENIZER.encode("lo", bos=False), end, *TOKENIZER.encode("hot", bos=False), end]
    assert example.tokens[np.asarray(example.weights) > 0].tolist() == learned


LONG = shown(image("images/0.png"), text("hello " * 9))


@pytest.mark.parametrize(
    ("entry", "options", "says"),
    [
        (shown(image("images/9.png")), {}, r"9\.png cannot be read as an image: there is no such"),
        (shown(image("data.jsonl")), {}, r"cannot be read as an image: it is no image that is kno"),
        (shown(image("images")), {}, "cannot be read as an image"),
        (shown(image("images/0.png")), {"vision": None}, "the model reads text only: it has no vi"),
        (shown({"type": "video", "path": "x"}), {}, "A part of a message is"),
        (shown(image("images/0.png", "url")), {}, "A part of a message is"),
        (shown(text("h<start_of_image>")), {}, "A part of a message is"),
        (shown(text("h"), answer=[image("images/0.png")]), {}, "A message is an object with the"),
        (LONG, {"length": 31}, r"has 52 tokens with its 1 image\(s\), and a row has 31"),
    ],
)
def test_a_bad_line_is_named(folder, entry, options, says):
    path = write(folder, {"text": "hello"}, entry)
    with pytest.raises(ValueError, match=f"data.jsonl:\nline 2: .*{says}"):
        data.read(path, TOKENIZER, **({"vision": VISION} | options))


@pytest.fixture
def examples(folder) -> list[train.Example]:
    """Two images, one, one and none."""
    both = shown(image("images/0.png"), text("h"), image("images/1.png"))
    one = shown(text("hello"), image("images/2.png"), answer="hot")
    other = shown(image("images/1.png"), answer="hello")
    path = write(folder, both, one, other, shown(text("el"), answer="lo lo"))
    return data.read(path, TOKENIZER, vision=VISION, length=43)


SHAPE = {"length": 43, "rows": 3, "vision": VISION}


def test_each_row_is_one_example_and_all_batches_have_one_shape(examples):
    given = train.batches(examples, **SHAPE, read=as_rgb, epochs=2)
    batches, states = zip(*given, strict=True)
    assert len(batches) == 4 == train.count_batches(examples, **SHAPE, epochs=2)
    assert states == ((0, 3), (1, 0), (1, 3), (2, 0))
    for batch in batches:
        assert batch.tokens.shape == (3, 43) and batch.pixels.shape == (3, 2, 12, 12, 3)
    for first, second in (batches[:2], batches[2:]):
        tokens = np.concatenate([first.tokens, second.tokens])
        counts = sorted((tokens < -1).sum(-1) // VISION.num_soft_tokens)
        # Two rows of the second batch are empty.
        assert counts == [0, 0, 0, 1, 1, 2]
        assert int((np.asarray(second.positions) >= 0).any(-1).sum()) == 1
    # What follows a state is what followed then.
    again = next(train.batches(examples, **SHAPE, read=as_rgb, start=states[1]))[0]
    for ours, theirs in zip(*map(jax.tree.leaves, (again, batches[2])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_images_are_never_dropped(examples):
    for batches in (
        train.pack(examples, length=43, rows=3),
        train.batches(examples, length=43, rows=3),
    ):
        with pytest.raises(ValueError, match="packed rows do not hold: give vision="):
            list(batches)
    learned, tested = train.split(examples, 0.25, length=5, seed=0)
    # A cut goes through texts only: the one without images becomes pieces.
    assert sum(len(example.images) for example in learned + tested) == 4
    whole = [example for example in learned + tested if example.images]
    assert sorted(len(e.tokens) for e in whole) == sorted(len(e.tokens) for e in examples[:3])


@pytest.mark.slow
def test_the_loss_is_that_of_the_logits(examples):
    model = chat_models.model(tiny.seeing(tiny.GEMMA3, VISION), SPECIAL)
    (batch, second) = train.pack(examples, **SHAPE, read=as_rgb)
    losses, weights = [], []
    for each in (batch, second):
        total, weight = jax.jit(train.image_loss)(model, each)
        losses.append(float(total))
        weights.append(float(weight))
    expected, rows = 0.0, jnp.full((4, 43 - SOFT), -1)
    for row, example in enumerate(examples):
        rows = rows.at[row, : len(example.tokens)].set(example.tokens)
    pixels = np.zeros((4, 2, 7, 11, 3), np.uint8)
    for row, example in enumerate(examples):
        for index, path in enumerate(example.images):
            pixels[row, index] = as_rgb(path)
    output = tiny.run(model, rows, images=jnp.asarray(pixels))
    logs = np.asarray(jax.nn.log_softmax(output.logits))
    for row, example in enumerate(examples):
        for at in np.flatnonzero(example.weights):
            before = at - 1
            # Logits of an image are those of its first token: nothing learned may follow one.
            assert example.tokens[before] != START
            expected -= logs[row, before, example.tokens[at]]
    assert sum(weights) == sum(example.weights.sum() for example in examples)
    # Both sum in float32, in another order.
    np.testing.assert_allclose(sum(losses), expected, rtol=1e-5)
    assert min(losses) > 1


@pytest.mark.slow
def test_gradients_in_bfloat16_are_finite_with_empty_rows(examples):
    model = chat_models.model(tiny.seeing(tiny.GEMMA3, VISION), SPECIAL)
    *_, batch = train.pack(examples, **SHAPE, read=as_rgb)

    def loss(model):
        options = {"compute_dtype": "bfloat16", "remat": "nothing"}
        return train.image_loss(model, batch, **options)[0]

    grads = jax.jit(jax.grad(loss))(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.abs(grads.embedding.weight).max() > 0
