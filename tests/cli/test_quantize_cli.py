"""Few bits at the command line: the same as in Python."""

import json

import formats
import jax
import jax.numpy as jnp
import pytest


pytest.importorskip("typer", reason="the command line is the extra `cli`")
pytest.importorskip("gguf", reason="GGUF files are written by the gguf library")

from typer.testing import CliRunner  # noqa: E402

import equigemma as eg  # noqa: E402
from equigemma import quantize  # noqa: E402
from equigemma.cli._app import app  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    weights = formats.model(formats.wide(formats.CONFIGS["gemma1 mqa"]))
    eg.save(weights, path, tokenizer=formats.tokenizer(), dtype="q8_0")
    return str(path)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", folder)


def run(*arguments: str, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "stored"])
def test_generate(model, weights):
    options = ("-n", 7, "--dtype", "float32", "--weights", weights, "--cache-dtype", "int8")
    result = run("generate", "hello", "-m", model, *options)
    assert result.exit_code == 0, result.stderr
    loaded, tokenizer = eg.load(model, dtype="float32", quantized=weights == "stored")
    loaded = quantize.int8(loaded) if weights == "int8" else loaded
    text = eg.generate(loaded, tokenizer, "hello", max_new_tokens=7, cache_dtype=jnp.int8)
    assert result.stdout == f"hello{text}\n"


def test_score(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("hello hotel", encoding="utf-8")
    options = (
        "--dtype",
        "float32",
        "--brief",
        "--cache-dtype",
        "int8",
        "--weights",
        "int8-groupwise",
    )
    result = run("score", model, path, *options)
    assert result.exit_code == 0, result.stderr
    loaded, tokenizer = eg.load(model, dtype="float32")
    loaded = quantize.int8(loaded, group_size=32)
    expected = eg.score(loaded, tokenizer, "hello hotel", cache_dtype=jnp.int8)
    assert json.loads(result.stdout)["perplexity"] == expected.perplexity
    assert expected.perplexity != eg.score(loaded, tokenizer, "hello hotel").perplexity


def test_blocks_that_are_not_there(tmp_path):
    path = tmp_path / "x.gguf"
    weights = formats.model(formats.CONFIGS["gemma1 mqa"])
    eg.save(weights, path, tokenizer=formats.tokenizer())
    result = run("generate", "hello", "-m", path, "--weights", "stored")
    assert result.exit_code == 2 and "here are none" in " ".join(result.stderr.split())
