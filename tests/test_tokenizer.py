"""Tokens and back: like the sentencepiece library's own models, and for any text there is."""

from functools import cache
from io import BytesIO

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from equigemma import _sentencepiece as spm
from equigemma.tokenizer import SentencePieceTokenizer, StreamingDecoder, Tokenizer


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


@pytest.mark.parametrize("index", [-1, 100_003])
def test_an_id_outside_of_the_vocabulary(index):
    with pytest.raises(ValueError, match=rf"below {tokenizer().vocab_size}, got {index}"):
        tokenizer().decode([index])


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
    assert spm.from_model(model) == vocabulary


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
        SentencePieceTokenizer(vocabulary._replace(tokens=tokens))


def test_a_vocabulary_that_the_library_refuses():
    vocabulary = spm.from_model(trained())
    twice = [*vocabulary.tokens[:-1], vocabulary.tokens[-2]]
    with pytest.raises(ValueError, match="sentencepiece refuses this vocabulary"):
        SentencePieceTokenizer(vocabulary._replace(tokens=twice))
