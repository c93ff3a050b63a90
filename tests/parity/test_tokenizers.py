"""Special tokens: the ids that `transformers` gives for a folder, and where llama.cpp stops."""

import json
from importlib.util import find_spec
from pathlib import Path

import formats
import gguf_files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.test_checkpoints import llama, needs_llama

import equigemma as eg
from equigemma import sampling
from equigemma.checkpoint.core._tokenizer_files import read_tokenizer
from equigemma.tokenizers import _sentencepiece_model as spm
from equigemma.tokenizers._tokenizer_json import to_json


transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# transformers adds <mask> to a vocabulary that lacks it.
VOCABULARY = formats.vocabulary()
VOCABULARY = VOCABULARY._replace(
    tokens=[*VOCABULARY.tokens, "<mask>"],
    scores=[*VOCABULARY.scores, -999.0],
    types=[*VOCABULARY.types, spm.CONTROL],
)
SIZE = len(VOCABULARY.tokens)
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def write(path: Path, kind: str, **files) -> Path:
    path.mkdir(exist_ok=True)
    if kind == "tokenizer.json":
        (path / kind).write_text(json.dumps(to_json(VOCABULARY)), encoding="utf-8")
    else:
        (path / kind).write_bytes(spm.to_model(VOCABULARY, unknown=3, bos=2, eos=1, pad=0))
    settings = {"tokenizer_class": "GemmaTokenizer"} | SPECIAL | files.pop("tokenizer_config", {})
    for name, content in (files | {"tokenizer_config": settings}).items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def decoder(*tokens: tuple[str, bool]) -> dict:
    old = [(token, True) for token in ("<pad>", "<eos>", "<bos>", "<unk>")]
    named = dict(enumerate(old)) | {SIZE - 3: ("<table>", False), SIZE - 2: ("<end_of_turn>", True)}
    named |= {SIZE + i: token for i, token in enumerate(tokens)}
    return {
        str(index): {"content": content, "special": special} | PLAIN
        for index, (content, special) in named.items()
    }


NEW = (("<|im_start|>", True), ("<|im_end|>", True), ("<tool call>", False), ("hello", False))
FOLDERS = {
    "added_tokens_decoder": (
        "tokenizer.model",
        {"tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder(*NEW)}},
    ),
    "added_tokens.json": (
        "tokenizer.model",
        {
            "tokenizer_config": {"eos_token": "<|im_end|>"},
            "added_tokens": {name: SIZE + i for i, (name, _) in enumerate(NEW)},
        },
    ),
    "special_tokens_map.json": (
        "tokenizer.model",
        {
            "special_tokens_map": {"eos_token": {"content": "<|im_end|>"} | PLAIN},
            "added_tokens": {name: SIZE + i for i, (name, _) in enumerate(NEW)},
        },
    ),
    "both": (
        "tokenizer.model",
        {
            "tokenizer_config": {"added_tokens_decoder": decoder(*NEW[:2])},
            "added_tokens": {"<other>": SIZE},
        },
    ),
    "another end": ("tokenizer.json", {"tokenizer_config": {"eos_token": "<end_of_turn>"}}),
    "others": (
        "tokenizer.json",
        {
            "tokenizer_config": {
                "boi_token": "<mask>",
                "extra_special_tokens": {"image_token": "<end_of_turn>"},
                "sep_token": "<unk>",
            }
        },
    ),
    "no padding": ("tokenizer.json", {"tokenizer_config": {"pad_token": None}}),
    "tokenizer.json": (
        "tokenizer.json",
        {"tokenizer_config": {"added_tokens_decoder": decoder(*NEW[:2])}},
    ),
}


@pytest.fixture(scope="module", params=FOLDERS)
def both(request, tmp_path_factory):
    kind, files = FOLDERS[request.param]
    path = write(tmp_path_factory.mktemp("tokenizer"), kind, **{**files})
    return read_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)


def test_named_tokens(both):
    ours, theirs = both
    assert ours.vocab_size == len(theirs)
    special = ours.special
    ids = (special.bos, special.eos, special.unknown)
    assert ids == (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id)
    # Where they have none, the vocabulary's own fills up.
    assert special.pad == (0 if theirs.pad_token_id is None else theirs.pad_token_id)


def test_what_chat_templates_are_given(both):
    ours, theirs = both
    names = {f"{name}_token": spelling for name, spelling in ours.special.names.items()}
    assert names == theirs.special_tokens_map


TEXTS = st.lists(
    st.sampled_from(
        [name for name, _ in NEW]
        + ["h", "e", "l", "o", " ", "  ", "\n", "<table>", "<end_of_turn>", "<eos>", "<", "é", "▁"]
    ),
    max_size=8,
).map("".join)


@given(text=TEXTS)
@settings(deadline=None, max_examples=150)
def test_ids_and_texts(both, text):
    ours, theirs = both
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, bos=False, special=True) == ids
    shown = theirs.decode(ids, skip_special_tokens=True)
    if theirs.added_tokens_encoder.get("<|im_start|>"):
        # added_tokens.json does not say what is special; here a token between bars is no text.
        shown = shown.replace("<|im_start|>", "")
    assert ours.decode(ids) == shown


def test_ids_behind_the_vocabulary(both):
    ours, theirs = both
    ids = [*ours.encode("hotel", bos=False), len(theirs), 1_000_000]
    assert ours.decode(ids) == theirs.decode(ids) == "hotel"
    for one in (ids[0], np.int64(ids[0])):
        assert ours.decode(one) == theirs.decode(one)


@pytest.mark.parametrize("stated", [7, [7, 8], [1, 270], None])
def test_what_stops_there_stops_here(stated, tmp_path):
    path = write(tmp_path / "m", "tokenizer.json", generation_config={"eos_token_id": stated})
    theirs = transformers.GenerationConfig.from_pretrained(path).eos_token_id
    theirs = {theirs} if isinstance(theirs, int) else set(theirs or ())
    assert theirs <= set(read_tokenizer(path).special.stop)


# llama.cpp.

NAMES = ["<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<EOT>", "<turn|>", "<|tool_response>"]


@needs_llama
@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        *((name, {}) for name in NAMES),
        ("[odd]", {"eos_token_id": 270}),
        ("[odd]", {"eot_token_id": 270}),
        ("[odd]", {"eom_token_id": 270}),
        ("[odd]", {}),
    ],
)
def test_generation_ends_where_llama_cpp_ends(name, metadata, tmp_path):
    if find_spec("gguf") is None:
        pytest.skip("GGUF files are written by the gguf library")
    index = gguf_files.TOKENS.index("<end_of_turn>")
    vocabulary = gguf_files.VOCABULARY | {
        "tokenizer.ggml.tokens": [*gguf_files.TOKENS[:-1], name],
        "tokenizer.ggml.token_type": [*gguf_files.TYPES[:-1], spm.NORMAL],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    vocabulary |= {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    path = gguf_files.write(tmp_path / "x.gguf", vocabulary=vocabulary)
    model, tokenizer = eg.load(path, dtype="float32")
    ours = eg.generate(
        model,
        tokenizer,
        "hello",
        sampler=sampling.make_sampler(logit_bias={index: 1e4}),
        max_new_tokens=4,
    )
    with llama(path) as ask:
        answer = ask(prompt="hello", n_predict=4, logit_bias=[[index, 1e4]])
    if "eos_token_id" not in metadata:
        # It would show the name of an end that the file takes for an ordinary piece.
        assert ours == answer["content"]
    stops = index in tokenizer.special.stop
    assert stops == (answer["stop_type"] == "eos") == (name != "[odd]" or bool(metadata))
