"""Strings that know where their characters come from: the results of `str`, and the right origin.

The template's own characters are drawn from one set here and those that were said from another, so
that each character of a result tells its origin.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equigemma.chat._provenance import OWN, SAID, UNKNOWN, Text, origin, said


# Letters with and without a form in capitals, signs, white space and ends of lines of both.
OWNS, SAIDS = "abß<\t\n ", "cdž>\v\r\u2003"


def letter(char: str) -> str:
    return OWN if char in OWNS or char in OWNS.upper() else SAID


def marked(text: str) -> Text:
    return Text(text, "".join(map(letter, text)))


TEXTS = st.text(OWNS + SAIDS, max_size=12)
SHORT = st.text(OWNS + SAIDS, min_size=1, max_size=2)
INDICES = st.none() | st.integers(-9, 9)
STEPS = st.sampled_from([None, 1, 2, -1, -3])

OPERATIONS = {
    "add": lambda s, a, b, i, j, k: s + a,
    "radd": lambda s, a, b, i, j, k: a + s,
    "mul": lambda s, a, b, i, j, k: (s * 3, 2 * s, s * -1),
    "slice": lambda s, a, b, i, j, k: s[i:j:k],
    "item": lambda s, a, b, i, j, k: s[-1] if s else s,
    "iterate": lambda s, a, b, i, j, k: list(s),
    "reversed": lambda s, a, b, i, j, k: list(reversed(s)),
    "str": lambda s, a, b, i, j, k: str(s),
    "lower": lambda s, a, b, i, j, k: s.lower(),
    "upper": lambda s, a, b, i, j, k: s.upper(),
    "title": lambda s, a, b, i, j, k: s.title(),
    "capitalize": lambda s, a, b, i, j, k: s.capitalize(),
    "strip": lambda s, a, b, i, j, k: (s.strip(), s.lstrip(), s.rstrip()),
    "strip of these": lambda s, a, b, i, j, k: (s.strip(a), s.lstrip(a), s.rstrip(b)),
    "removeprefix": lambda s, a, b, i, j, k: (s.removeprefix(a), (a + s).removeprefix(a)),
    "removesuffix": lambda s, a, b, i, j, k: (s.removesuffix(a), (s + a).removesuffix(a)),
    "removesuffix of nothing": lambda s, a, b, i, j, k: s.removesuffix(""),
    "split": lambda s, a, b, i, j, k: (s.split(), s.split(None, 1), s.rsplit(None, 1)),
    "split at": lambda s, a, b, i, j, k: (s.split(a), s.split(a, 1), s.rsplit(a, 1), s.rsplit(a)),
    "splitlines": lambda s, a, b, i, j, k: (s.splitlines(), s.splitlines(True)),
    "partition": lambda s, a, b, i, j, k: (s.partition(a), s.rpartition(a)),
    "replace": lambda s, a, b, i, j, k: (s.replace(a, b), s.replace(a, b, 1), s.replace(a, "")),
    "join": lambda s, a, b, i, j, k: (s.join([a, b, a]), a.join(s), s.join(())),
}


def pairs(plain, kept):
    """Results of `str` and of ours, string by string."""
    if isinstance(plain, str):
        yield plain, kept
        return
    assert len(plain) == len(kept) and type(plain) is type(kept)
    for one, other in zip(plain, kept, strict=True):
        yield from pairs(one, other)


@pytest.mark.parametrize("name", OPERATIONS)
@given(text=TEXTS, a=SHORT, b=SHORT, i=INDICES, j=INDICES, k=STEPS)
@settings(deadline=None, max_examples=150)
def test_results_and_their_origin(name, text, a, b, i, j, k):
    operation = OPERATIONS[name]
    plain = operation(text, a, b, i, j, k)
    kept = operation(marked(text), marked(a), marked(b), i, j, k)
    for one, other in pairs(plain, kept):
        assert one == other and hash(one) == hash(other)
        letters = origin(other)
        assert len(letters) == len(one)
        # Of a character that became two, nothing is known.
        if name in ("lower", "upper", "title", "capitalize") and len(one) != len(text):
            assert set(letters) <= {UNKNOWN}
        elif name not in ("lower", "upper", "title", "capitalize"):
            assert letters == "".join(map(letter, one))
        else:
            assert letters == "".join(map(letter, text))


@pytest.mark.parametrize(
    "operation",
    [
        lambda s: "%s|" % s,  # noqa: UP031
        lambda s: "{}|".format(s),  # noqa: UP032
        lambda s: (s + "%s") % 1,
        lambda s: (s + "{}").format(1),
        lambda s: f"{s}<",
        lambda s: "".join([s, s]),
        lambda s: s.center(9),
        lambda s: s.ljust(9),
        lambda s: s.zfill(9),
        lambda s: s.expandtabs(),
        lambda s: s.translate({97: "x"}),
        lambda s: s.swapcase(),
        lambda s: s.casefold(),
        lambda s: s.encode().decode(),
        lambda s: s.replace("", "x"),
        lambda s: repr(s),
        lambda s: str([s]),
    ],
)
def test_of_what_is_not_followed_nothing_is_known(operation):
    """The rule by which a forgotten operation can do no harm."""
    for letters in (OWN, SAID):
        made = operation(Text("a<b", letters))
        assert set(origin(made)) <= {UNKNOWN}, made


def test_an_ordinary_string_makes_nothing_known():
    own = Text("<", OWN)
    assert origin(own + "eos") == "o???" and origin("eos" + own) == "???o"
    assert origin(own.join(["eos", ">"])) == "???o?"
    assert origin(Text("a<b", SAID).replace("<", "eos")) == "s???s"
    assert origin(Text("abc")) == "???"


def test_the_origin_is_out_of_reach_by_its_name():
    assert Text.__slots__ == ("_origin",)
    with pytest.raises(AttributeError):
        Text("a", OWN).origin


def test_all_that_is_said_is_marked():
    value = said({"a": ["b", {"c": 1, "d": None}], "e": True})
    assert value == {"a": ["b", {"c": 1, "d": None}], "e": True}

    def texts(value):
        match value:
            case str():
                yield value
            case dict():
                for key, item in value.items():
                    yield from (*texts(key), *texts(item))
            case list():
                for item in value:
                    yield from texts(item)

    assert [origin(text) for text in texts(value)] == [SAID] * 5
