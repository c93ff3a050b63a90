"""Patterns of files against Python's own matcher, and patterns that it would never finish."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equigemma.peft._pattern import PatternError, matches, matches_whole


NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.v_proj",
    "model.language_model.layers.3.mlp.gate_proj",
    "lm_head",
    "q_proj",
    "",
    "a-b c\n",
]
PATTERNS = [
    "q_proj",
    "^q_proj",
    "q.proj",
    r".*\.(q|v)_proj",
    r"layers\.(\d|1\d)\.self_attn\.q_proj",
    r"(.*\.)?(layers.1.self_attn.v_proj)$",
    r"(.*\.)?(^q_proj)$",
    r"(.*\.)?(q_proj|^lm_head)$",
    r".*[a-f]+_.*",
    r"[^.]+\.[^.]+",
    r"\w+(\.\w+)*",
    "a{2}",
    "[ml].{1,3}h",
    r"(?:mo|q).*_proj\Z",
    r"(?P<x>lm)_head$",
    r".*?\blayers\b.*",
    r"x{",
    "l{,2}m",
    "[]a]*",
    r"[\w.]+",
    "()",
    "|q_proj",
    r"\.",
    r"\-",
    "a-b c$",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_people_write(pattern):
    for name in NAMES:
        assert matches(pattern, name) == bool(re.match(pattern, name)), name
        assert matches_whole(pattern, name) == bool(re.fullmatch(pattern, name)), name


PIECES = ["a", "b", ".", "^", "$", r"\.", r"\d", "[ab]", "[^a]", "(a|b)", "(ab)", "(|a)", r"\b"]
ENDS = ["", "", "*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "{0}"]


@given(
    st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(ENDS)), max_size=5),
    st.booleans(),
    st.text("ab1.\n", max_size=7),
)
@settings(deadline=None, max_examples=500)
def test_any_pattern(parts, is_grouped, text):
    pattern = "".join(piece + end for piece, end in parts)
    pattern = rf"(.*\.)?({pattern})$" if is_grouped else pattern
    try:
        expected = re.match(pattern, text), re.fullmatch(pattern, text)
    except re.error:
        return
    assert (matches(pattern, text), matches_whole(pattern, text)) == tuple(map(bool, expected))


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(a*)*(a*)*b", "(.*)*" * 9 + "b", "a?" * 99]
)
def test_no_pattern_takes_for_ever(pattern):
    start = time.monotonic()
    assert matches(pattern, "a" * 200) == pattern.endswith("?")
    # Python's own would take 2 to the power of 200 steps.
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "[a", "*", "a**", "(?i)a", "(?=a)", r"(a)\1", r"\k", "a{99999}", "(a{999}){999}"]
    + ["(" * 99, "[b-a]", r"(?P=x)", "\\", "a++", "{,2}", "(a|{3})"],
)
def test_what_is_refused(pattern):
    with pytest.raises(PatternError):
        matches(pattern, "a")
