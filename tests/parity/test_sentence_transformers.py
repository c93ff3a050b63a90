"""Vectors of texts: those of the library `sentence-transformers` for the same folder."""

import json
from pathlib import Path

import formats
import numpy as np
import pytest

import equigemma as eg
from equigemma.checkpoint import CheckpointError
from equigemma.checkpoint.sentence_transformers._read import _read_gguf
from equigemma.checkpoint.sentence_transformers._settings import SETTINGS, TEXTS
from equigemma.embedding import EmbedderSettings
from equigemma.tokenizers._tokenizer_json import around_texts


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
library = pytest.importorskip(
    "sentence_transformers", reason='needs pip install "equigemma[parity]"'
)

from parity.test_checkpoints import llama, needs_llama  # noqa: E402
from parity.test_embedding import change, their_config, write, write_gguf  # noqa: E402


TOKENIZER = formats.tokenizer()
BOS, EOS = {"<bos>": TOKENIZER.special.bos}, {"<eos>": TOKENIZER.special.eos}
WORDS = [
    "hello",
    "",
    "Hello Hotel",
    "hell to hello " * 9,
    "tell <table>hel</table>  me\n\n",
    "ÉΑΣ İ ß",
    " h ",
]
# It warns of a default prompt, and where it is slow.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    theirs = transformers.Gemma3TextModel(their_config()).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" not in name:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return theirs


def put(path: Path, values: dict) -> None:
    if path.exists():
        change(path, values)
    else:
        path.write_text(json.dumps(values))


def folder(path: Path, model, **files: dict) -> Path:
    """A folder with these entries in its files."""
    write(path, model)
    for name, values in files.items():
        put(path / f"{name}.json", values)
    return path


def around(before: dict, after: dict) -> dict:
    return {"tokenizer": {"post_processor": around_texts(before, after)}}


FILES = {
    "as it is": {},
    "no end": around(BOS, {}),
    "no beginning": around({}, EOS),
    "neither": {"tokenizer": {"post_processor": None}},
    "the config has no say": {
        **around(BOS, {}),
        "tokenizer_config": {"add_eos_token": True, "add_bos_token": False},
    },
    "short": {"sentence_bert_config": {"max_seq_length": 7}},
    "very short": {"sentence_bert_config": {"max_seq_length": 3}},
    "short by the tokenizer": {"tokenizer_config": {"model_max_length": 9}},
    "short by the model": {"config": {"max_position_embeddings": 11}},
    "all of these": {
        "sentence_bert_config": {"max_seq_length": 13},
        "tokenizer_config": {"model_max_length": 9},
        "config": {"max_position_embeddings": 11},
    },
    "null": {
        "sentence_bert_config": {"max_seq_length": None},
        "tokenizer_config": {"model_max_length": 1e30},
    },
    "lower case": {"sentence_bert_config": {"do_lower_case": True}},
    "prompts": {
        "config_sentence_transformers": {
            "prompts": {"query": "tell: ", "other": "hot "},
            "default_prompt_name": "query",
        }
    },
    "prompt in lower case and cut": {
        "sentence_bert_config": {"do_lower_case": True, "max_seq_length": 12},
        "config_sentence_transformers": {
            "prompts": {"query": "TELL: "},
            "default_prompt_name": "query",
        },
    },
    "a default without a prompt": {
        "config_sentence_transformers": {"prompts": {}, "default_prompt_name": "query"}
    },
    "newer": {
        "sentence_bert_config": {
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "last_hidden_state"}
            },
            "module_output_name": "token_embeddings",
        }
    },
    "fewer numbers": {"config_sentence_transformers": {"truncate_dim": 5}},
    "more numbers than there are": {"config_sentence_transformers": {"truncate_dim": 999}},
}


def texts_for(name: str) -> list[str]:
    # Without any token the library divides by zero.
    return [text for text in WORDS if text or name != "neither"]


@pytest.mark.parametrize("name", FILES)
def test_vectors_are_those_of_the_library(name, model, tmp_path):
    path = folder(tmp_path / "model", model, **FILES[name])
    ours, tokenizer = eg.load_embedder(path, dtype="float32")
    theirs = library.SentenceTransformer(str(path), device="cpu")
    texts = texts_for(name)
    expected = theirs.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    # Of vectors of length 1, from hidden states that sum in float32 in another order.
    close = {"rtol": 0, "atol": 2e-6}
    np.testing.assert_allclose(eg.embed(ours, tokenizer, texts), expected, **close)
    assert ours.settings.max_length == theirs.max_seq_length or name == "null"
    for options in ({"prompt": "hot: "}, {"prompt": ""}, {"prompt_name": "query"}):
        expected = theirs.encode(texts, normalize_embeddings=True, **options)
        np.testing.assert_allclose(eg.embed(ours, tokenizer, texts, **options), expected, **close)
    expected = theirs.encode(texts, normalize_embeddings=True, truncate_dim=5)
    np.testing.assert_allclose(eg.embed(ours, tokenizer, texts, truncate_dim=5), expected, **close)


@pytest.mark.parametrize(
    "name", ["neither", "short", "prompt in lower case and cut", "no beginning", "fewer numbers"]
)
def test_what_we_save_the_library_reads(name, model, tmp_path):
    path = folder(tmp_path / "model", model, **FILES[name])
    ours, tokenizer = eg.load_embedder(path, dtype="float32")
    eg.save(ours, tmp_path / "saved", tokenizer=tokenizer)
    again, _ = eg.load_embedder(tmp_path / "saved")
    assert again.settings == ours.settings
    theirs = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = texts_for(name)
    np.testing.assert_allclose(
        theirs.encode(texts, normalize_embeddings=True),
        eg.embed(ours, tokenizer, texts),
        rtol=0,
        atol=2e-6,
    )


def test_what_the_library_saves_we_read(model, tmp_path):
    path = folder(tmp_path / "model", model, **FILES["short"])
    theirs = library.SentenceTransformer(str(path), device="cpu")
    theirs.save_pretrained(str(tmp_path / "saved"))
    ours, tokenizer = eg.load_embedder(tmp_path / "saved", dtype="float32")
    np.testing.assert_allclose(
        eg.embed(ours, tokenizer, WORDS),
        theirs.encode(WORDS, normalize_embeddings=True),
        rtol=0,
        atol=2e-6,
    )


def test_a_long_text_is_cut_only_if_it_may_be(model, tmp_path):
    path = folder(tmp_path / "model", model, **FILES["short"])
    ours, tokenizer = eg.load_embedder(path, dtype="float32")
    assert ours.settings.max_length == 7
    says = "Text 2 of 2 has 10 tokens with its prompt, and the model reads 7: shorten it"
    with pytest.raises(ValueError, match=says):
        eg.embed(ours, tokenizer, ["h", "hhh hhh"], prompt="hh", truncate=False)
    fits = eg.embed(ours, tokenizer, ["h", "hhh"], prompt="hh", truncate=False)
    np.testing.assert_array_equal(fits, eg.embed(ours, tokenizer, ["h", "hhh"], prompt="hh"))


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        (TEXTS, {"max_seq_length": 2}, "must leave room for a text beside the 2 tokens around it"),
        (TEXTS, {"max_seq_length": "9"}, "max_seq_length must be a number"),
        (TEXTS, {"do_lower_case": "yes"}, "do_lower_case is 'yes', not true or false"),
        (TEXTS, {"query_length": 32}, "has query_length, which is not supported"),
        (TEXTS, {"processing_kwargs": {"text": {"max_length": 3}}}, "has processing_kwargs"),
        (TEXTS, {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'; only"),
        (TEXTS, {"strange": 1}, "options that are not supported: sentence_bert_config.json: stran"),
        (SETTINGS, {"model_type": "CrossEncoder"}, "model_type is 'CrossEncoder'"),
        (SETTINGS, {"truncate_dim": 0}, "truncate_dim must be a whole number from 1 up"),
        (SETTINGS, {"prompts": {"a": 1}}, "prompts and default_prompt_name must be texts"),
        (SETTINGS, {"default_prompt_name": "a"}, "no prompt called 'a'; the model has document"),
        ("tokenizer.json", {"post_processor": {"type": "Bert"}}, "is of the type 'Bert'"),
        ("tokenizer.json", {"post_processor": {"type": "TemplateProcessing"}}, "is damaged"),
    ],
)
def test_what_is_refused_by_name(name, values, says, model, tmp_path):
    path = folder(tmp_path / "model", model)
    put(path / name, values)
    with pytest.raises(CheckpointError, match=says):
        eg.load_embedder(path)


def test_a_folder_with_a_sentencepiece_model_says_what_is_around_a_text(model, tmp_path):
    path = folder(tmp_path / "model", model)
    (path / "tokenizer.json").unlink()
    settings = json.loads((path / "tokenizer_config.json").read_text())
    del settings["add_bos_token"], settings["add_eos_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="does not say add_bos_token: releases of transf"):
        eg.load_embedder(path)
    for begins in (True, False):
        for ends in (True, False):
            change(path / "tokenizer_config.json", {"add_bos_token": begins, "add_eos_token": ends})
            ours = eg.load_embedder(path)[0].settings
            theirs = transformers.AutoTokenizer.from_pretrained(path)("h")["input_ids"]
            letter = TOKENIZER.encode("h", bos=False)
            assert [*ours.prefix, *letter, *ours.suffix] == theirs


def test_a_gguf_has_no_place_for_these(model, tmp_path):
    ours, tokenizer = eg.load_embedder(folder(tmp_path / "model", model, **FILES["lower case"]))
    with pytest.raises(CheckpointError, match="no place for prompts that come by themselves"):
        eg.save(ours, tmp_path / "x.gguf", tokenizer=tokenizer)


@needs_llama
@pytest.mark.parametrize("begins", [None, True, False])
@pytest.mark.parametrize("ends", [None, True, False])
def test_tokens_around_a_text_are_those_of_llama_cpp(begins, ends, model, tmp_path):
    weights = write(tmp_path / "model", model)
    path = write_gguf(
        tmp_path / "x.gguf",
        (None, model, None),
        weights,
        vocabulary={"add_bos_token": begins, "add_eos_token": ends},
    )
    ours = _read_gguf(path, TOKENIZER.special)
    with llama(path, "--embedding", route="tokenize") as ask:
        theirs = ask(content="h", add_special=True)["tokens"]
    assert [*ours.prefix, *TOKENIZER.encode("h", bos=False), *ours.suffix] == theirs


def test_the_defaults_are_those_of_embeddinggemma():
    usual = EmbedderSettings()
    assert (usual.prefix, usual.suffix, usual.max_length) == ((2,), (1,), 2048)
    assert usual.prompt(None) == usual.prompt("query") == ""
