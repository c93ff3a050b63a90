"""`equigemma finetune`, as it is typed: what it writes, how it goes on, what it refuses."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equigemma as eg
from equigemma import lora, peft, train


pytest.importorskip("typer", reason="the command line is the extra `cli`")
pytest.importorskip("orbax.checkpoint", reason="checkpoints are the extra `orbax`")
gguf_files = pytest.importorskip("gguf_files", reason="GGUF files are written by the gguf library")


from finetune_runs import own_folders, run  # noqa: E402, F401  (a fixture)

from equigemma.cli import _finetune, _settings  # noqa: E402


TEXTS = ["hello hello hello", "lo hot hello", "hello lo lo lo", "hot hot hello lo"]
ADAPTER_PARTS = (".down", ".up", ".magnitude")
OPTIONS = (
    "--length",
    16,
    "--batch-tokens",
    32,
    "--learning-rate",
    0.01,
    "--validation-fraction",
    0.25,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    gguf_files.write(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 2))
    return path


@pytest.mark.slow
def test_a_run_leaves_metrics_curves_samples_and_a_model(model, data, tmp_path):
    out = tmp_path / "out"
    result = run(model, data, "--out", out, *OPTIONS, "--steps", 11, "--evaluate-every", 5)
    assert result.exit_code == 0, result.stderr
    lines = train.read_metrics(out / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 12))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert {"targets", "gradient_norm", "learning_rate", "padding", "seconds"} <= steps[0].keys()
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 5, 10, 11]
    assert "validation loss:" in result.stderr
    assert json.loads((out / "settings.json").read_text())["learning_rate"] == 0.01

    png = (out / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n") and png.endswith(b"IEND\xaeB`\x82")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 11, 11]
    assert [sample["prompt"] for sample in samples[:2]] == [s["prompt"] for s in samples[2:]]

    tuned, tokenizer = eg.load(out / "model", dtype="bfloat16")
    text = eg.generate(tuned, tokenizer, samples[0]["prompt"], max_new_tokens=5)
    assert isinstance(text, str)
    before, _ = eg.load(model, dtype="bfloat16")
    assert (before.embedding.weight != tuned.embedding.weight).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--lora-kind", "dora"), ("--quantize-base", "int8")], ids=str
)
def test_adapters_learn_and_are_merged(model, data, tmp_path, options):
    out = tmp_path / "out"
    command = (model, data, "--out", out, *OPTIONS, "--steps", 3, "--lora", 2)
    result = run(*command, "--format", "gguf", "--output-dtype", "float32", *options)
    assert result.exit_code == 0, result.stderr
    tuned, _ = eg.load(out / "model.gguf", dtype="bfloat16")
    before, _ = eg.load(model, dtype="bfloat16")
    merged = lora.merge(peft.load(before, out / "adapter"))
    for left, right in zip(*map(jax.tree.leaves, (merged, tuned)), strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(tuned.embedding.weight, before.embedding.weight)
    gates = [m.layers[0].ffw.gate.weight for m in (before, tuned)]
    assert (gates[0] != gates[1]).any()
    (described,) = (out / "checkpoints").glob("3/state/_METADATA")
    names = [name for name in json.loads(described.read_text())["tree_metadata"] if "[" in name]
    learned = [name for name in names if name.strip("(',)").endswith(ADAPTER_PARTS)]
    # Only adapters and their moments are in the checkpoints.
    assert learned
    assert {name for name in names if "layers" in name or "embedding" in name} == set(learned)


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_with_the_same_command(model, data, tmp_path, monkeypatch):
    command = (model, data, *OPTIONS, "--steps", 5, "--seed", 3)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(*command, "--out", whole).exit_code == 0

    write = train.MetricsFile.write

    def write_and_stop(self, step, **values):
        write(self, step, **values)
        if step == 2 and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.MetricsFile, "write", write_and_stop)
    result = run(*command, "--out", stopped)
    assert result.exit_code == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM after step 2, which is saved" in result.stderr
    assert not (stopped / "model").exists()

    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = run(*command, "--out", stopped)
    assert result.exit_code == 0, result.stderr
    assert "2 of them done before" in result.stderr
    curves = [
        [
            {name: value for name, value in line.items() if name != "seconds"}
            for line in train.read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (whole, stopped)
    ]
    assert curves[0] == curves[1]
    models = [eg.load(folder / "model")[0] for folder in (whole, stopped)]
    for left, right in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_array_equal(left, right)

    result = run(*command, "--out", stopped, "--lora", 2)
    assert result.exit_code == 2
    assert "holds another run: lora was 0, now it is 2" in " ".join(result.stderr.split())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_sentence(model, data, tmp_path, monkeypatch):
    def broken(model, batch, **options):
        total, weight = loss(model, batch, **options)
        return total * jnp.inf, weight

    loss = train.next_token_loss
    monkeypatch.setattr(train, "next_token_loss", broken)
    result = run(
        model, data, "--out", tmp_path / "out", *OPTIONS, "--steps", 3, "--validation-fraction", 0
    )
    assert result.exit_code == 2
    assert "Step 1: the loss is inf. The state before it is kept." in " ".join(
        result.stderr.split()
    )
    assert "Traceback" not in result.stderr
    # Nothing was learned, so nothing is kept: better data may go there.
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "nan"], "--learning-rate must be a finite number, got nan"),
        (["--learning-rate", "inf"], "--learning-rate must be a finite number, got inf"),
        (["--learning-rate", 0], "--learning-rate must be above 0, got 0.0"),
        (["--learning-rate", -1e-3], "--learning-rate must be above 0, got -0.001"),
        (["--weight-decay", "nan"], "--weight-decay must be a finite number, got nan"),
        (["--weight-decay", -0.1], "--weight-decay must be at least 0, got -0.1"),
        (["--max-grad-norm", "nan"], "--max-grad-norm must be a finite number, got nan"),
        (["--max-grad-norm", "inf"], "--max-grad-norm must be a finite number, got inf"),
        (["--warmup", "nan"], "--warmup must be in [0, 1), got nan"),
        (["--validation-fraction", "nan"], "--validation-fraction must be in [0, 1), got nan"),
        (["--steps", 0], "--steps must be at least 1, got 0"),
        (["--evaluate-every", 0], "--evaluate-every must be at least 1, got 0"),
        (["--save-every", 0], "--save-every must be at least 1, got 0"),
        (["--batch-tokens", 0], "--batch-tokens must be at least 2, got 0"),
        (["--seed", -1], "--seed must be from 0 to 4294967295, got -1"),
        (["--seed", 1 << 64], "--seed must be from 0 to 4294967295, got 18446744073709551616"),
        (["--output-dtype", "q8_0"], "--output-dtype q8_0 is a dtype of .gguf files"),
        (["--micro-batches", 300], "of which there are at most 4, got 300"),
        (["--lora", -1], "--lora must be at least 0, got -1"),
        (["--epochs", 0], "--epochs must be at least 1, got 0"),
        (["--length", 1, "--batch-tokens", 2], "--length must be at least 2, got 1"),
        (["--batch-tokens", 1000], "must be a multiple of --length, got 1000 and 512"),
        (["--micro-batches", 3, "--batch-tokens", 2048], "divide the 4 rows of a batch, got 3"),
        (["--validation-fraction", 1.5], "--validation-fraction must be in [0, 1), got 1.5"),
        (["--max-grad-norm", 0], "--max-grad-norm must be above 0"),
        (["--quantize-base", "int8"], "--quantize-base needs --lora"),
    ],
)
def test_bad_options_are_one_sentence(model, data, tmp_path, arguments, message):
    result = run(model, data, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


BAD_DATA = {
    "a typo": (b'{"text": "hello"}\n{"txt": "hello"}\n', "line 2: expected either 'text'"),
    "nothing": (b"", "the file has no lines"),
    "a binary file": (b"hello\0", "not text: byte 5 is zero"),
    "a compressed file": (b"\x1f\x8b\x08", "compressed with gzip: unpack it first"),
    "one text": (b'{"text": "hello"}', "too few to hold out 1"),
    "one token": (b'{"prompt": "hello"}', "'completion': nothing"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_leaves_nothing_behind_and_claims_nothing(model, data, tmp_path, kind):
    content, message = BAD_DATA[kind]
    bad, out = tmp_path / "bad.jsonl", tmp_path / "new" / "out"
    bad.write_bytes(content)
    result = run(model, bad, "--out", out)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_typo_in_the_data_is_mended_and_the_folder_is_free(model, data, tmp_path, monkeypatch):
    out, mended = tmp_path / "out", tmp_path / "mended.jsonl"
    out.mkdir()
    mended.write_text('{"text": "hello"}\n' * 3 + '{"txt": "hello"}\n')
    command = (model, mended, "--out", out, *OPTIONS, "--steps", 2)
    assert "line 4: expected either 'text'" in run(*command).stderr
    assert list(out.iterdir()) == []
    mended.write_bytes(data.read_bytes())

    # As if the process were killed before its first checkpoint: files, and no word from Python.
    def killed(*arguments, **options):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(_finetune, "clear", lambda folder: None)
        patch.setattr(_settings, "clear", lambda folder: None)
        patch.setattr(train, "fit", killed)
        assert run(*command).exit_code == 9
    assert {path.name for path in out.iterdir()} >= {"settings.json", "samples.jsonl"}

    mended.write_bytes(data.read_bytes() + b'{"text": "hello lo"}\n')
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 2, 2]
    # Now it is another run's.
    mended.write_bytes(data.read_bytes())
    result = run(*command)
    assert result.exit_code == 2 and "holds another run: data_sha256 was" in result.stderr
    assert (out / "model").is_dir()


def test_files_of_others_are_never_taken_away(model, data, tmp_path):
    for number, name in enumerate(("thesis.txt", "settings.json", "metrics.jsonl")):
        out = tmp_path / str(number)
        out.mkdir()
        (out / name).write_text('{"editor.fontSize": 12}')
        result = run(model, data, "--out", out, *OPTIONS)
        assert result.exit_code == 2 and "holds files that are no run's" in result.stderr
        assert (out / name).read_text() == '{"editor.fontSize": 12}'


@pytest.mark.slow
def test_rows_are_as_many_and_as_long_as_the_data_fills(model, tmp_path):
    """57 short texts: in rows of 512 most of a step of 2,048 tokens would be padding."""
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": "hello " * (n % 5 + 1)}) + "\n" for n in range(57)))
    out = tmp_path / "out"
    command = (model, path, "--out", out, "--learning-rate", 0.01, "--steps", 3)
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    settings = json.loads((out / "settings.json").read_text())
    rows = settings["batch_tokens"] // settings["length"]
    lines = [line for line in train.read_metrics(out / "metrics.jsonl") if "loss" in line]
    _, tokenizer = eg.load(model)
    learned, _ = train.split(eg.data.read(path, tokenizer), 0.05, length=512)
    tokens = sum(len(example.tokens) for example in learned)
    # One batch for an epoch, less than a tenth of it padding; it was more than half.
    expected = 1 - tokens / settings["batch_tokens"]
    assert 0 <= expected < 0.1 and 1 - tokens / 2048 > 0.5
    np.testing.assert_allclose([line["padding"] for line in lines], expected, atol=1e-7)
    assert f"batches of {rows} x {settings['length']} tokens, {expected:.0%} padding" in " ".join(
        result.stderr.split()
    )
    # The same command finds the same, and has nothing left to do.
    assert "3 of them done before" in run(*command).stderr


def test_bad_files_are_one_sentence(model, data, tmp_path):
    def message(*arguments):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
        return " ".join(result.stderr.split())

    assert "there is no such file" in message(model, tmp_path / "none", "--out", tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").touch()
    assert "holds files that are no run's" in message(model, data, "--out", full)
    assert "nothing can be written" in message(model, data, "--out", full / "thesis.txt" / "out")
    assert "is a folder: name one of its files" in message(model, tmp_path, "--out", tmp_path / "a")
    assert "nothing to load" in message(tmp_path / "none", data, "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()
