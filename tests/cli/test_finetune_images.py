"""`equigemma finetune` on conversations about images, for a model from llama.cpp's two files."""

import json
from dataclasses import replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest


pytest.importorskip("typer", reason="the command line is the extra `cli`")
pytest.importorskip("orbax.checkpoint", reason="checkpoints are the extra `orbax`")
pytest.importorskip("gguf", reason="GGUF files are written by the gguf library")
pillow = pytest.importorskip("PIL.Image", reason="images are files, which Pillow reads")

import chat_models  # noqa: E402
import formats  # noqa: E402
from finetune_runs import own_folders, run  # noqa: E402, F401  (a fixture)

import equigemma as eg  # noqa: E402
from equigemma import train  # noqa: E402
from equigemma.cli import _tuning  # noqa: E402
from equigemma.cli._finetune_data import FinetuneData  # noqa: E402
from equigemma.images import as_rgb  # noqa: E402
from equigemma.nn import preprocess_images  # noqa: E402
from equigemma.text import encode_image  # noqa: E402


SPECIAL = (*chat_models.GEMMA3, "<start_of_image>", "<end_of_image>")
TOKENIZER = chat_models.tokenizer(SPECIAL)
START, END = (TOKENIZER.encode(name, bos=False, special=True)[0] for name in SPECIAL[2:])
NEWLINE = TOKENIZER.encode("\n\n", bos=False)[0]
OPTIONS = ("--length", 32, "--batch-tokens", 96, "--learning-rate", 0.01, "--evaluate-every", 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    like = formats.SEEING["4 averaged"]
    vision = replace(like.vision, start=START, end=END, newline=NEWLINE)
    path = tmp_path_factory.mktemp("model") / "x.gguf"
    drawn = formats.model(replace(like, vocab=TOKENIZER.vocab_size, vision=vision))
    eg.save(drawn, path, tokenizer=TOKENIZER)
    return path


@pytest.fixture
def data(tmp_path):
    """Dark images are `hello`, bright ones are `lo`; and a line of text."""
    rng, lines = np.random.default_rng(0), [{"text": "hello lo"}]
    for index in range(8):
        pixels = rng.integers(0, 128, (12, 12, 3)) + 128 * (index % 2)
        pillow.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{index}.png")
        parts = [{"type": "image", "path": f"{index}.png"}, {"type": "text", "text": "hot"}]
        answer = {"role": "assistant", "content": ["hello", "lo"][index % 2]}
        lines.append({"messages": [{"role": "user", "content": parts}, answer]})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_a_model_learns_of_images(model, data, tmp_path, monkeypatch):
    # One of each model is enough, and each is compiled anew.
    monkeypatch.setattr(_tuning, "SAMPLES", 1)
    honest, seen = eg.sampling.generate, []

    def generate(model, tokens, *, soft_tokens, **options):
        images = (encode_image(model.vision, tmp_path / f"{index}.png") for index in range(8))
        is_there = soft_tokens is not None
        is_there = is_there and any(np.array_equal(soft_tokens[0], image) for image in images)
        seen.append((is_there, int((tokens < 0).sum())))
        return honest(model, tokens, soft_tokens=soft_tokens, **options)

    monkeypatch.setattr(eg.sampling, "generate", generate)
    out = tmp_path / "out"
    command = (model, data, "--out", out, *OPTIONS, "--steps", 7, "--validation-fraction", 0.2)
    result = run(*command, "--format", "gguf", "--output-dtype", "float32")
    assert result.exit_code == 0, result.stderr
    lines = train.read_metrics(out / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 7 and losses[-1] < 0.5 * losses[0]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 3, 6, 7]
    # The first of the validation set has an image, which the model sees before it goes on.
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 7]
    assert seen == 2 * [(True, formats.SEEING["4 averaged"].vision.num_soft_tokens)]
    # Everything has learned, the tower too, and is in both files.
    before, after = (eg.load(path, dtype="float32")[0] for path in (model, out / "model.gguf"))
    assert (out / "mmproj-model.gguf").is_file() and after.config == before.config
    patches = [m.vision.tower.patches.linear.weight for m in (before, after)]
    assert np.abs(patches[0] - patches[1]).max() > 1e-3


def test_batches_show_each_conversation_its_image(model, data, tmp_path):
    loaded, tokenizer = eg.load(model, dtype="float32")
    shape = {"validation_fraction": 0.2, "length": 32, "rows": 3, "seed": 0}
    data_set = FinetuneData.read(data, loaded, tokenizer, **shape)
    paths = [tmp_path / f"{index}.png" for index in range(8)]
    size = loaded.config.vision.pixels
    images = [np.asarray(preprocess_images(jnp.asarray(as_rgb(path)), size)) for path in paths]
    epoch = [
        (batch.positions < 0).mean()
        for batch, _ in islice(data_set.train_batches(train.DataState()), 3)
    ]
    np.testing.assert_allclose(data_set.shape.padding, np.mean(epoch), rtol=1e-6)
    found = set()
    learned = (batch for batch, _ in islice(data_set.train_batches(train.DataState()), 3))
    for batch in (*learned, *data_set.eval_batches()):
        rows = map(np.asarray, (batch.pixels, batch.targets, batch.weights))
        for (shown, *_), targets, weights in zip(*rows, strict=True):
            if shown.any():
                (index,) = (i for i, image in enumerate(images) if np.array_equal(shown, image))
                answer = tokenizer.decode(targets[weights > 0])
                assert answer.startswith(["hello", "lo"][index % 2])
                found.add(index)
    assert found == set(range(8))


@pytest.mark.slow
def test_adapters_learn_of_images(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(_tuning, "SAMPLES", 0)
    out = tmp_path / "out"
    command = (
        model,
        data,
        "--out",
        out,
        *OPTIONS,
        "--steps",
        2,
        "--lora",
        2,
        "--validation-fraction",
        0,
    )
    result = run(*command, "--format", "gguf")
    assert result.exit_code == 0, result.stderr
    before, after = (eg.load(path, dtype="bfloat16")[0] for path in (model, out / "model.gguf"))
    assert (before.layers[0].ffw.gate.weight != after.layers[0].ffw.gate.weight).any()
    for left, right in zip(
        *(jax.tree.leaves(m.vision.tower) for m in (before, after)), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_what_is_bad_is_said_before_anything_is_learned(model, data, tmp_path):
    def message(model, out):
        result = run(model, data, "--out", out, *OPTIONS)
        assert result.exit_code == 2 and "Traceback" not in result.stderr
        assert not (out / "samples.jsonl").exists()
        return " ".join(result.stderr.split())

    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone/x.gguf"
    alone.write_bytes(model.read_bytes())
    assert "line 2: it has images, and the model reads text only" in message(alone, tmp_path / "1")
    (tmp_path / "5.png").write_bytes(b"GIF89a")
    assert (
        "line 7: " in (said := message(model, tmp_path / "2")) and "5.png cannot be read as" in said
    )
