"""Tokens and back: like the sentencepiece library's own models, and for any text there is."""

from functools import cache
from io import BytesIO

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from equigemma.tokenizers import (
    SentencePieceTokenizer,
    SpecialTokens,
    StreamingDecoder,
    Tokenizer,
)
from equigemma.tokenizers import _sentencepiece_model as spm


spm_library = pytest.importorskip("sentencepiece", reason='needs pip install "equigemma[gguf]"')

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs!",
    "How vexingly quick daft zebras jump, said the fox to the dog.",
    "  two  spaces   three\nnew line\ttab",
]
STEERING = ("<start_of_turn>", "<end_of_turn>", "<unused7>", "[multimodal]")
MARKUP = ("▁▁", "▁▁▁", "\n\n", "<table>")


@cache
def trained() -> bytes:
    """A model file from sentencepiece's own trainer, with the settings of Gemma."""
    out = BytesIO()
    spm_library.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        model_type="bpe",
        vocab_size=397,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[*STEERING, *MARKUP],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


@cache
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(spm.from_model(trained()))


@cache
def reference():
    """The same file in the library itself, where user-defined pieces steer too."""
    return spm_library.SentencePieceProcessor(model_proto=trained())


def any_text():
    pieces = st.sampled_from(
        [
            *STEERING,
            *MARKUP,
            *CORPUS,
            "<bos>",
            "<",
            "  ",
            "日本語",
            "👩‍👩‍👧",
            "مرحبا",
            "\x00",
            "\r\n",
            "�",
        ]
    )
    return st.lists(st.text(max_size=5) | pieces, max_size=7).map("".join)


@given(any_text())
@settings(deadline=None)
@example("")
@example(" leading, trailing ")
@example("\ud7ff\ue000\U0010ffff")
def test_a_text_comes_back(text):
    # Inside the vocabulary ▁ stands for a space, so it comes back as one: see the next test.
    text = text.replace("▁", "")
    ids = tokenizer().encode(text)
    assert ids[0] == tokenizer().special.bos
    assert tokenizer().decode(ids) == text
    assert tokenizer().encode(text, bos=False) == ids[1:]


def test_the_sign_for_a_space_comes_back_as_a_space():
    assert tokenizer().decode(tokenizer().encode("a▁b")) == "a b"


@given(any_text())
@settings(deadline=None)
def test_ids_are_those_of_the_library(text):
    for piece in STEERING:
        text = text.replace(piece, "")
    assert tokenizer().encode(text, bos=False) == reference().encode(text)


@given(st.lists(st.integers(0, 396), max_size=31))
@settings(deadline=None)
def test_streaming_gives_the_same_text(ids):
    ids = [index % tokenizer().vocab_size for index in ids]
    stream = StreamingDecoder(tokenizer())
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.finish() == tokenizer().decode(ids)


def test_a_character_is_shown_when_its_last_byte_is_there():
    ids = tokenizer().encode("é👩", bos=False)
    assert len(ids) == 2 + 4
    stream = StreamingDecoder(tokenizer())
    assert [stream.push(index) for index in ids] == ["", "é", "", "", "", "👩"]
    assert stream.finish() == ""
    assert [stream.push(index) for index in ids[:3]] == ["", "é", ""]
    assert stream.finish() == "\ufffd"
    assert stream.push(ids[3]) == "\ufffd"


def test_special_tokens_in_a_text_are_text():
    text = "<start_of_turn>user\nhi<end_of_turn><bos>"
    special = tokenizer().special
    steering = {special.start_of_turn, special.end_of_turn, special.bos}
    plain = tokenizer().encode(text, bos=False)
    assert not steering & set(plain)
    assert tokenizer().decode(plain) == text
    parsed = tokenizer().encode(text, bos=False, special=True)
    assert [index for index in parsed if index in steering] == [
        special.start_of_turn,
        special.end_of_turn,
        special.bos,
    ]
    assert tokenizer().decode(parsed) == "user\nhi"
    assert tokenizer().encode("<table>", bos=False) == [reference().piece_to_id("<table>")]


def test_the_longest_special_token_wins():
    vocabulary = spm.from_model(trained())
    tokens = [*vocabulary.tokens, "<|turn>", "<|turn>>"]
    longer = SentencePieceTokenizer(
        spm.Vocabulary(
            tokens,
            [*vocabulary.scores, 0.0, 0.0],
            [*vocabulary.types, spm.USER_DEFINED, spm.CONTROL],
        )
    )
    assert longer.encode("<|turn>><|turn>", bos=False, special=True) == [
        len(tokens) - 1,
        len(tokens) - 2,
    ]


def test_special_ids():
    special = tokenizer().special
    assert (special.pad, special.eos, special.bos, special.unknown) == (0, 1, 2, 3)
    assert (special.start_of_turn, special.end_of_turn) == (4, 5)
    assert special.stop == (1, 5)
    assert isinstance(tokenizer(), Tokenizer)
    assert tokenizer().vocab_size == reference().vocab_size()
    assert repr(tokenizer()) == f"SentencePieceTokenizer({tokenizer().vocab_size} tokens)"


def test_arrays_are_decoded():
    ids = tokenizer().encode("quick fox")
    assert tokenizer().decode(np.array(ids, np.int32)) == "quick fox"
    assert tokenizer().decode([]) == ""
    with pytest.raises(ValueError, match=r"one row of ids, got an array of shape \(1, \d+\)"):
        tokenizer().decode(np.array([ids]))


@pytest.mark.parametrize(
    "ids",
    [
        [np.int64(40), np.uint8(41)],
        [jnp.asarray(40), jnp.asarray(41)],
        (40, np.asarray(41)),
        np.asarray([40, 41], np.uint16),
        jnp.asarray([40, 41]),
        range(40, 42),
    ],
)
def test_rows_of_ids_of_any_kind(ids):
    assert tokenizer().decode(ids) == tokenizer().decode([40, 41]) != ""
    assert tokenizer().decode(list(ids)) == tokenizer().decode([40, 41])


@pytest.mark.parametrize("kind", [int, np.int32, np.asarray, jnp.asarray])
def test_one_id_is_decoded(kind):
    index = tokenizer().encode("fox", bos=False)[0]
    assert tokenizer().decode(kind(index)) == tokenizer().decode([index]) != ""


def test_an_id_behind_the_vocabulary_has_no_text():
    size = tokenizer().vocab_size
    ids = tokenizer().encode("quick fox")
    assert tokenizer().decode([*ids[:3], size, *ids[3:], 100_003]) == "quick fox"
    assert tokenizer().token_bytes(size) == tokenizer().token_bytes(100_003) == b""
    stream = StreamingDecoder(tokenizer())
    assert "".join(map(stream.push, [*ids, size])) + stream.finish() == "quick fox"


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        ([-1], ValueError, "A token id must be at least 0, got -1"),
        ([[1, 2], [3]], ValueError, "must be one row of ids, got rows of several lengths"),
        ([0.5], TypeError, r"`ids` must be whole numbers, .*, got \[0.5\]"),
        (["fox"] * 99, TypeError, "`ids` must be whole numbers, as `encode` gives them, got"),
        ("fox", TypeError, "`ids` must be whole numbers"),
        (None, TypeError, "`ids` must be whole numbers, as `encode` gives them, got None"),
    ],
)
def test_what_is_no_row_of_ids(ids, error, says):
    with pytest.raises(error, match=says) as raised:
        tokenizer().decode(ids)
    assert len(str(raised.value)) < 150


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"fox", r"`text` must be a str, got b'fox'; text.decode\(\) makes one of bytes"),
        (None, "`text` must be a str, got None"),
        (["fox"], r"`text` must be a str, got \['fox'\]; encode a list one by one"),
        (b"x" * 999, "`text` must be a str"),
    ],
)
def test_what_is_no_text(text, says):
    with pytest.raises(TypeError, match=says) as raised:
        tokenizer().encode(text)
    assert len(str(raised.value)) < 150


def test_half_a_surrogate_pair():
    with pytest.raises(ValueError, match=r"position 1 is '\\ud800', half of a surrogate pair"):
        tokenizer().encode("a\ud800")


def test_a_model_file(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained())
    text = CORPUS[0]
    assert SentencePieceTokenizer.from_file(path).encode(text) == tokenizer().encode(text)
    path.write_bytes(b"no model at all")
    with pytest.raises(ValueError, match=r"tokenizer\.model: This is not a SentencePiece model"):
        SentencePieceTokenizer.from_file(path)


def test_our_model_file_says_the_same_to_the_library():
    vocabulary = spm.from_model(trained())
    ours = spm_library.SentencePieceProcessor(
        model_proto=spm.to_model(vocabulary, unknown=3, bos=2, eos=1, pad=0)
    )
    assert (ours.pad_id(), ours.eos_id(), ours.bos_id(), ours.unk_id()) == (0, 1, 2, 3)
    every = list(range(ours.vocab_size()))
    assert ours.id_to_piece(every) == reference().id_to_piece(every)
    assert ours.get_score(every) == reference().get_score(every)
    for text in CORPUS:
        assert ours.encode(text) == reference().encode(text)


def test_long_pieces_and_their_lengths_survive():
    tokens = ["a" * length for length in (1, 99, 100, 127, 128, 129, 16_384, 20_011)]
    vocabulary = spm.Vocabulary(tokens, [-1.5] * len(tokens), [spm.NORMAL] * len(tokens))
    model = spm.to_model(vocabulary, unknown=0, bos=1, eos=2, pad=3)
    ids = {"unk": 0, "bos": 1, "eos": 2, "pad": 3}
    assert spm.from_model(model) == vocabulary._replace(ids=ids)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"model_type": "unigram"}, "byte-pair merges"),
        ({"byte_fallback": False}, "bytes as fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "no normalisation"),
        ({"add_dummy_prefix": True}, "no space added in front"),
        ({"remove_extra_whitespaces": True}, "no space removed"),
        ({"treat_whitespace_as_suffix": True}, "spaces in front of words"),
    ],
)
def test_a_model_that_treats_text_in_another_way_is_refused(change, rule):
    out = BytesIO()
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    spm_library.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        vocab_size=311,
        hard_vocab_limit=False,
        minloglevel=2,
        **(settings | change),
    )
    with pytest.raises(ValueError, match=f"would have: {rule}"):
        spm.from_model(out.getvalue())


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(deadline=None)
def test_a_damaged_model_file_is_read_or_refused(place, byte):
    data = bytearray(trained())
    data[place % len(data)] = byte
    for damaged in (bytes(data), bytes(data[: place % len(data)])):
        try:
            survivor = SentencePieceTokenizer(spm.from_model(damaged))
        except ValueError as error:
            assert "SentencePiece model" in str(error) or "vocabulary" in str(error)
        else:
            assert survivor.decode(survivor.encode("quick fox")) is not None


@pytest.mark.parametrize("missing", ["<bos>", "<eos>", "<pad>", "<unk>"])
def test_a_vocabulary_without_a_special_token(missing):
    vocabulary = spm.from_model(trained())
    tokens = [token.replace(missing, "<other>") for token in vocabulary.tokens]
    with pytest.raises(ValueError, match=f"no piece called {missing}"):
        SentencePieceTokenizer(vocabulary._replace(tokens=tokens, ids={}))


@pytest.mark.parametrize("renamed", ["bos", "eos", "pad", "unk"])
def test_special_tokens_are_known_by_id(renamed):
    vocabulary = spm.from_model(trained())
    index = vocabulary.ids[renamed]
    tokens = ["<|im_end|>" if i == index else token for i, token in enumerate(vocabulary.tokens)]
    named = SentencePieceTokenizer(vocabulary._replace(tokens=tokens))
    assert named.special == tokenizer().special
    assert named.encode("<|im_end|>", bos=False, special=True) == [index]
    assert index not in named.encode("<|im_end|>", bos=False)
    assert named.decode([index]) == ""


def test_an_id_that_is_not_in_the_vocabulary_is_no_special_token():
    vocabulary = spm.from_model(trained())
    with pytest.raises(ValueError, match="The id of its eos token is 9999, and it has"):
        SentencePieceTokenizer(vocabulary._replace(ids={"eos": 9999}))


def test_ends_of_a_generation():
    vocabulary = spm.from_model(trained())
    assert tokenizer().special.stop == (1, 5)
    more = SentencePieceTokenizer(vocabulary._replace(stop=(7, 1, 9999)))
    assert more.special.stop == (1, 5, 7, 9999)
    assert SpecialTokens(bos=2, eos=1, pad=0, end_of_turn=5).stop == (1, 5)
    assert SpecialTokens(bos=2, eos=1, pad=0, end_of_turn=1).stop == (1,)
    assert SpecialTokens(bos=2, eos=1, pad=0, stop=(7,)).stop == (7,)


def test_a_turn_is_never_text():
    vocabulary = spm.from_model(trained())
    pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
    types = [spm.NORMAL if token in STEERING else kind for token, kind in pairs]
    plain = SentencePieceTokenizer(vocabulary._replace(types=types))
    assert plain.special == tokenizer().special
    assert plain.decode([4, 5]) == ""
    # Only the names of turns; others are what their file takes them for.
    assert plain.decode([6]) == "<unused7>"


def test_special_tokens_are_found():
    found = list(tokenizer().find_special("a<bos><start_of_turn> <<eos>[multimodal]<table>"))
    assert [(start, token) for start, token, _ in found] == [
        (1, "<bos>"),
        (6, "<start_of_turn>"),
        (23, "<eos>"),
        (28, "[multimodal]"),
    ]
    assert [index for *_, index in found] == [2, 4, 1, 7]


def test_a_vocabulary_that_the_library_refuses():
    vocabulary = spm.from_model(trained())
    twice = [*vocabulary.tokens[:-1], vocabulary.tokens[-2]]
    with pytest.raises(ValueError, match="sentencepiece refuses this vocabulary"):
        SentencePieceTokenizer(vocabulary._replace(tokens=twice))
