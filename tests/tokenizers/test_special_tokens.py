"""Special tokens as the files of a checkpoint state them: ids, added tokens, stop tokens."""

import json
from pathlib import Path
from typing import Any

import formats
import gguf_files
import pytest

import equigemma as eg
from equigemma import sampling
from equigemma.checkpoint import CheckpointError
from equigemma.checkpoint.core._tokenizer_files import read_tokenizer
from equigemma.checkpoint.gguf._container import GGUFFile
from equigemma.checkpoint.gguf._vocab import read_tokenizer as read_gguf
from equigemma.tokenizers import _sentencepiece_model as spm
from equigemma.tokenizers._tokenizer_json import to_json


for _module in ("gguf", "sentencepiece", "tokenizers"):
    pytest.importorskip(_module, reason='needs pip install "equigemma[test]"')

VOCABULARY = formats.vocabulary()
SIZE = len(VOCABULARY.tokens)
END_OF_TURN = VOCABULARY.tokens.index("<end_of_turn>")
KINDS = ["tokenizer.json", "tokenizer.model"]


def added(content: str, special: bool = True, **options) -> dict[str, Any]:
    return {"content": content, "special": special} | options


def folder(
    path: Path, kind: str = "tokenizer.model", vocabulary: spm.Vocabulary = VOCABULARY, **files
) -> Path:
    """A vocabulary in a file of this kind, and JSON files beside it."""
    if kind == "tokenizer.json":
        (path / kind).write_text(json.dumps(to_json(vocabulary)), encoding="utf-8")
    else:
        (path / kind).write_bytes(spm.to_model(vocabulary, unknown=3, bos=2, eos=1, pad=0))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("files", "stop"),
    [
        ({}, (1, END_OF_TURN)),
        ({"generation_config": {"eos_token_id": 7}}, (1, END_OF_TURN, 7)),
        ({"generation_config": {"eos_token_id": [9, 1, 7]}}, (1, END_OF_TURN, 9, 7)),
        ({"generation_config": {"eos_token_id": None}}, (1, END_OF_TURN)),
        ({"config": {"eos_token_id": [7]}}, (1, END_OF_TURN, 7)),
        ({"config": {"text_config": {"eos_token_id": 7}}}, (1, END_OF_TURN, 7)),
        ({"config": {"text_config": None, "eos_token_id": -1}}, (1, END_OF_TURN)),
        (
            {"generation_config": {"eos_token_id": [8]}, "config": {"eos_token_id": 7}},
            (1, END_OF_TURN, 8, 7),
        ),
        ({"tokenizer_config": {"eos_token": "<end_of_turn>"}}, (END_OF_TURN, 1)),
        ({"special_tokens_map": {"eos_token": {"content": "<end_of_turn>"}}}, (END_OF_TURN, 1)),
    ],
)
def test_a_generation_ends_at_every_id_that_a_folder_states(kind, files, stop, tmp_path):
    assert read_tokenizer(folder(tmp_path, kind, **files)).special.stop == stop


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"generation_config": {"eos_token_id": "</s>"}},
            "must be an id or a list of ids, got '</s",
        ),
        ({"tokenizer_config": {"eos_token": "<nope>"}}, "eos_token is '<nope>', which the vocab"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder is no object"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"271": {}}}},
            r"damaged: added_tokens_decoder\['271'\]",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"271": added("<x>", lstrip=True)}}},
            "the token '<x>' has lstrip, which is not supported",
        ),
        ({"added_tokens": {"<x>": "271"}}, "'<x>' has no id"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"274": added("<x>")}}},
            "gives the token '<x>' the id 274, .* is not the next after 270",
        ),
    ],
)
def test_files_that_make_no_sense(kind, files, says, tmp_path):
    with pytest.raises(CheckpointError, match=says):
        read_tokenizer(folder(tmp_path, kind, **files))


@pytest.mark.parametrize("content", ["<x>", "el"])
def test_ids_that_contradict_the_vocabulary(content, tmp_path):
    files = {"tokenizer_config": {"added_tokens_decoder": {"268": added(content)}}}
    with pytest.raises(CheckpointError, match=f"gives the token '{content}' the id 268"):
        read_tokenizer(folder(tmp_path, "tokenizer.model", **files))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["spelling", "id"])
def test_a_renamed_end_is_known(kind, where, tmp_path):
    tokens = ["<|im_end|>" if i == 1 else token for i, token in enumerate(VOCABULARY.tokens)]
    renamed = VOCABULARY._replace(tokens=tokens, ids={"eos": 1})
    files = {
        "spelling": {"tokenizer_config": {"eos_token": "<|im_end|>"}},
        "id": {"config": {"eos_token_id": 1}},
    }[where]
    tokenizer = read_tokenizer(folder(tmp_path, kind, renamed, **files))
    assert (tokenizer.special.eos, tokenizer.special.stop) == (1, (1, END_OF_TURN))
    assert tokenizer.encode("h<|im_end|>", bos=False, special=True)[-1] == 1
    assert 1 not in tokenizer.encode("h<|im_end|>", bos=False)


@pytest.mark.parametrize(
    "decoder", [True, False], ids=["added_tokens_decoder", "added_tokens.json"]
)
def test_added_tokens_of_a_model_file(decoder, tmp_path):
    if decoder:
        names = [added("<|im_end|>"), added("<tool call>", special=False)]
        files = {
            "tokenizer_config": {
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {str(SIZE + i): name for i, name in enumerate(names)},
            },
            "added_tokens": {"<other>": SIZE},
        }
    else:
        files = {
            "tokenizer_config": {"eos_token": "<|im_end|>"},
            "added_tokens": {"<tool call>": SIZE + 1, "<|im_end|>": SIZE},
        }
    tokenizer = read_tokenizer(folder(tmp_path, **files))
    assert tokenizer.vocab_size == SIZE + 2
    assert tokenizer.special.stop == (SIZE, 1, END_OF_TURN)
    h, e = (tokenizer.encode(letter, bos=False)[0] for letter in "he")
    text = "h<|im_end|>e<tool call>h"
    assert tokenizer.encode(text, bos=False, special=True) == [h, SIZE, e, SIZE + 1, h]
    plain = tokenizer.encode(text, bos=False)
    assert SIZE not in plain and SIZE + 1 in plain
    assert tokenizer.decode(plain) == text


def test_a_tokenizer_json_with_tokens_that_were_added_since(tmp_path):
    files = {"tokenizer_config": {"added_tokens_decoder": {str(SIZE): added("<|im_end|>")}}}
    tokenizer = read_tokenizer(folder(tmp_path, "tokenizer.json", **files))
    assert tokenizer.encode("<|im_end|>", bos=False, special=True) == [SIZE]
    # What the file itself has counts more.
    files = {"tokenizer_config": {"added_tokens_decoder": {"5": added("<end_of_turn>")}}}
    tokenizer = read_tokenizer(folder(tmp_path, "tokenizer.json", **files))
    assert tokenizer.encode("<end_of_turn>", bos=False, special=True) == [END_OF_TURN]


@pytest.mark.parametrize("kind", KINDS)
def test_chat_templates_are_given_the_tokens_of_the_files(kind, tmp_path):
    settings = {"eos_token": "<end_of_turn>", "image_token": "<table>", "pad_token": None}
    tokenizer = read_tokenizer(folder(tmp_path, kind, tokenizer_config=settings))
    names = {"bos": "<bos>", "eos": "<end_of_turn>", "unk": "<unk>", "image": "<table>"}
    assert tokenizer.special.names == names
    template = eg.chat.Template("{{ bos_token }}h{{ eos_token }}{{ pad_token }}")
    ids = template.encode(tokenizer, [eg.chat.User("hello")])
    assert ids == [2, *tokenizer.encode("h", bos=False), END_OF_TURN]


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"tokenizer_config": {"chat_template": "a"}}, "a"),
        ({"chat_template": {"chat_template": "b"}}, "b"),
        (
            {"tokenizer_config": {"chat_template": "a"}, "chat_template": {"chat_template": "b"}},
            "a",
        ),
        ({"tokenizer_config": {"chat_template": None}}, None),
        (
            {"tokenizer_config": {"chat_template": [{"name": "default", "template": "c"}]}},
            "c",
        ),
    ],
)
def test_where_a_folder_has_its_chat_template(files, template, tmp_path):
    folder(tmp_path, **files, config={})
    assert eg.checkpoint.load_chat_template(tmp_path) == template
    (tmp_path / "chat_template.jinja").write_text("d")
    assert eg.checkpoint.load_chat_template(tmp_path) == "d"


# GGUF.


def gguf(path: Path, **metadata) -> Path:
    vocabulary = gguf_files.VOCABULARY | {f"tokenizer.ggml.{k}": v for k, v in metadata.items()}
    return gguf_files.write(path / "x.gguf", vocabulary=vocabulary)


def of_gguf(path: Path, **metadata) -> eg.tokenizers.Tokenizer:
    file = gguf(path, **metadata)
    return read_gguf(GGUFFile.open(file).metadata, origin=file)


@pytest.mark.parametrize(
    ("metadata", "stop"),
    [
        ({}, (1, END_OF_TURN)),
        ({"eos_token_id": END_OF_TURN}, (END_OF_TURN, 1)),
        ({"eos_token_id": 7}, (7, 1, END_OF_TURN)),
        ({"eot_token_id": 7, "eom_token_id": 8}, (1, END_OF_TURN, 7, 8)),
        ({"eos_token_id": 2**32 - 1, "eot_token_id": 99_999}, (1, END_OF_TURN)),
    ],
)
def test_a_generation_ends_at_every_id_that_a_gguf_states(metadata, stop, tmp_path):
    assert of_gguf(tmp_path, **metadata).special.stop == stop


@pytest.mark.parametrize("kind", [spm.NORMAL, spm.USER_DEFINED])
@pytest.mark.parametrize("name", ["<end_of_turn>", "<|im_end|>", "<EOT>"])
def test_the_end_of_a_turn_is_no_text_whatever_its_type(kind, name, tmp_path):
    types = [*gguf_files.TYPES[:-1], kind]
    tokenizer = of_gguf(tmp_path, tokens=[*gguf_files.TOKENS[:-1], name], token_type=types)
    assert tokenizer.special.stop == (1, END_OF_TURN)
    assert tokenizer.decode([END_OF_TURN]) == ""
    assert tokenizer.encode(name, bos=False, special=True) == [END_OF_TURN]
    assert END_OF_TURN not in tokenizer.encode(name, bos=False)


def test_a_text_that_ends_a_generation_stays_text(tmp_path):
    letter = gguf_files.TOKENS.index("l")
    tokenizer = of_gguf(tmp_path, eos_token_id=letter)
    assert tokenizer.special.stop == (letter, 1, END_OF_TURN)
    assert tokenizer.encode("l", bos=False) == [letter] and tokenizer.decode([letter]) == "l"


def test_a_gguf_names_its_special_tokens_by_id(tmp_path):
    tokens = ["<begin>", "<end>", "<none>", "<odd>", *gguf_files.TOKENS[4:]]
    ids = {"bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 2, "unknown_token_id": 3}
    special = of_gguf(tmp_path, tokens=tokens, **ids).special
    assert (special.bos, special.eos, special.pad, special.unknown) == (0, 1, 2, 3)


def test_a_control_token_keeps_its_spaces(tmp_path):
    tokens = [*gguf_files.TOKENS[:-1], "<a b>"]
    tokenizer = of_gguf(tmp_path, tokens=tokens)
    assert tokenizer.encode("<a b>", bos=False, special=True) == [END_OF_TURN]


# What is saved.


@pytest.mark.parametrize("format", ["folder", "x.gguf"])
def test_ends_survive(format, tmp_path):
    stated = SIZE - 3
    tokenizer = formats.tokenizer()
    tokenizer = type(tokenizer)(VOCABULARY._replace(stop=(stated,), ids={"eos": END_OF_TURN}))
    model = formats.model(formats.CONFIGS["gemma3"])
    eg.save(model, tmp_path / format, tokenizer=tokenizer)
    _, again = eg.load(tmp_path / format)
    assert again.special.eos == END_OF_TURN
    assert set(again.special.stop) == {1, END_OF_TURN, stated}


# Generation.


@pytest.mark.slow
@pytest.mark.parametrize("stop", [SIZE - 1, 7])
def test_texts_end_where_the_files_say(stop, tmp_path):
    model = formats.model(formats.CONFIGS["gemma3"])
    eg.save(model, tmp_path / "m", tokenizer=formats.tokenizer())
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    model, tokenizer = eg.load(tmp_path / "m", dtype="float32")
    only = sampling.make_sampler(logit_bias={stop: 1e4})
    assert eg.generate(model, tokenizer, "hello", sampler=only) == tokenizer.decode([stop])
    assert list(eg.stream(model, tokenizer, "hello", sampler=only)) == [tokenizer.decode([stop])]


@pytest.mark.slow
def test_rows_behind_the_vocabulary_are_generated_as_nothing():
    model, tokenizer = formats.model(formats.CONFIGS["gemma3"]), formats.tokenizer()
    assert tokenizer.vocab_size < formats.VOCAB
    only = sampling.make_sampler(logit_bias={formats.VOCAB - 1: 1e4})
    options = {"sampler": only, "max_new_tokens": 3}
    assert eg.generate(model, tokenizer, "hello", **options) == ""
    assert list(eg.stream(model, tokenizer, "hello", **options)) == [""] * 3
    chat = eg.Chat(model, tokenizer, format=eg.chat.Template("{{ messages[0].content }}"))
    assert chat.send("hello", **options).reply == ""
