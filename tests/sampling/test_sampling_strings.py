"""Stop strings, against a search of the whole text one character at a time."""

import itertools
from typing import Any

import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma.text import IncrementalDetokenizer
from equigemma.tokenizers import SpecialTokens


class Pieces:
    """Tokens of none to four bytes, some of them parts of characters."""

    special = SpecialTokens(bos=0, eos=1, pad=2)
    pieces = ["", "", "", "a", "b", "ab", "ba", "aab", "bb", " ", "abba", b"\xc3", b"\xa9", "é"]
    pieces += [chr(ord("c") + index) for index in range(tiny.VOCAB - len(pieces))]
    vocab_size = tiny.VOCAB

    def encode(self, text, *, bos=True, special=False):
        return [0] * bos + [self.pieces.index(letter) for letter in text]

    def decode(self, ids):
        return b"".join(map(self.token_bytes, np.asarray(ids).tolist())).decode(errors="replace")

    def token_bytes(self, index):
        piece = self.pieces[index]
        return piece if isinstance(piece, bytes) else piece.encode()


TOKENIZER = Pieces()
MODEL = tiny.model(tiny.GEMMA3)
STOPS = [
    ["ab"],
    ["abab", "b b"],
    ["aba", "ba"],
    ["abb", "bbab", "é"],
    ["aaaa", "aab"],
    ["ba", "bab"],
]


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, the longest of several."""
    for end in range(len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            return text[: end - len(max(endings, key=len))]
    return text


def test_text_is_cut_before_the_stop_string_however_it_is_spelled():
    rng = np.random.default_rng(0)
    stopped = 0
    for stops, _ in itertools.product(STOPS, range(300)):
        ids = rng.integers(3, 14, rng.integers(1, 12)).tolist()
        detokenizer = IncrementalDetokenizer(TOKENIZER, stops)
        pieces = [detokenizer.push(index) for index in ids]
        assert "".join([*pieces, detokenizer.finish()]) == cut(TOKENIZER.decode(ids), stops)
        stopped += detokenizer.stopped
    assert 400 < stopped < 1400, "both outcomes must have been seen often"


def test_nothing_is_held_back_longer_than_it_must_be():
    rng = np.random.default_rng(1)
    for stops, _ in itertools.product(STOPS, range(100)):
        detokenizer, given, ids = IncrementalDetokenizer(TOKENIZER, stops), "", []
        for index in rng.integers(3, 11, 12).tolist():
            ids.append(index)
            given += detokenizer.push(index)
            if detokenizer.stopped:
                break
            text = TOKENIZER.decode(ids)
            possible = [
                size
                for size in range(len(text) + 1)
                if any(stop.startswith(text[len(text) - size :]) for stop in stops)
            ]
            assert given == text[: len(text) - max(possible)]


def test_after_the_stop_string_there_is_no_more_text():
    detokenizer = IncrementalDetokenizer(TOKENIZER, ["b"])
    assert [detokenizer.push(index) for index in (3, 4, 3, 3)] == ["a", "", "", ""]
    assert detokenizer.stopped
    assert detokenizer.finish() == ""


@pytest.fixture(scope="module")
def free() -> Any:
    """Two texts that no string stops."""
    return eg.generate(MODEL, TOKENIZER, ["ab", "b ba b"], **OPTIONS)


OPTIONS: dict[str, Any] = {"max_new_tokens": 23, "temperature": 3.0, "seed": 5, "stop_tokens": ()}


def spanning(text: str) -> str:
    """A string from the middle of a text, of several tokens."""
    return text[5:9]


def test_generated_text_ends_before_stop_strings_row_by_row(free):
    stops = [spanning(free[0])]
    texts = eg.generate(MODEL, TOKENIZER, ["ab", "b ba b"], stop_strings=stops, **OPTIONS)
    assert texts == [cut(text, stops) for text in free]
    assert len(texts[0]) <= 5
    whole = eg.generate(MODEL, TOKENIZER, ["ab", "b ba b"], stop_strings=["never"], **OPTIONS)
    assert whole == free


def test_streamed_text_never_shows_a_part_of_a_stop_string(free):
    stop = spanning(free[0])
    pieces = list(eg.stream(MODEL, TOKENIZER, "ab", stop_strings=[stop], **OPTIONS))
    assert "".join(pieces) == cut(free[0], [stop])
    assert len(pieces) < 23
    assert list(eg.stream(MODEL, TOKENIZER, "ab", stop_strings=stop, **OPTIONS)) == pieces


@pytest.mark.slow
def test_samples_are_a_list_for_each_prompt(free):
    samples: Any = eg.generate(MODEL, TOKENIZER, ["ab", "b ba b"], num_samples=2, **OPTIONS)
    assert [len(texts) for texts in samples] == [2, 2]
    assert len({text for texts in samples for text in texts}) == 4
    stop = [samples[1][1][3:6]]
    stopped = eg.generate(
        MODEL, TOKENIZER, ["ab", "b ba b"], num_samples=2, stop_strings=stop, **OPTIONS
    )
    assert stopped == [[cut(text, stop) for text in texts] for texts in samples]
    assert eg.generate(MODEL, TOKENIZER, "b ba b", num_samples=2, **OPTIONS) == samples[1]


def test_a_sampler_takes_the_place_of_temperature(free):
    options: dict[str, Any] = OPTIONS | {
        "temperature": 0.0,
        "sampler": eg.sampling.make_sampler(temperature=3.0),
    }
    assert eg.generate(MODEL, TOKENIZER, ["ab", "b ba b"], **options) == free
    options["temperature"] = 3.0
    with pytest.raises(ValueError, match="temperature=3.0 and a sampler were given"):
        eg.generate(MODEL, TOKENIZER, "a", **options)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="at least one character, got an empty one"):
        eg.generate(MODEL, TOKENIZER, "a", stop_strings=["a", ""], max_new_tokens=2)
