"""`tokenizer.json`, the file of the `tokenizers` library: to a vocabulary, and from one.

The file lists merges in order of preference; SentencePiece gives each piece a score, and prefers
the merge that makes the piece with the best one. Where all merges that make a piece stand together,
as in every Gemma, each form follows from the other. Nothing here turns text into tokens.

**Source:** tokenizers `src/models/bpe/serialization.rs`, `src/tokenizer/serialization.rs`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from equigemma.tokenizers import _sentencepiece_model as spm
from equigemma.tokenizers._vocabulary import Pieces


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


class Merges(NamedTuple):
    """A vocabulary, and its merges, the preferred first."""

    vocabulary: spm.Vocabulary
    pairs: list[tuple[str, str]]


def from_json(data: Mapping[str, Any]) -> Merges:
    """Vocabulary and merges of a file that treats text as Gemma's tokenizers do.

    What is done around a text, such as a token in front of it, is left to the caller.

    **Raises:** `ValueError` if something is damaged, or is done to a text that no Gemma's does.
    """
    model = data.get("model")
    if not isinstance(model, dict):
        raise ValueError("It has no model.")
    _check_settings(data, model)
    added = _added(data)
    tokens = _tokens(model, added)
    pairs, made = _merges(model, set(tokens) | set(model["vocab"]))
    types = [spm.BYTE if _BYTE.fullmatch(token) else spm.NORMAL for token in tokens]
    for index, (_, is_special) in added.items():
        types[index] = spm.CONTROL if is_special else spm.USER_DEFINED
    return Merges(spm.Vocabulary(tokens, _scores(tokens, made), types), pairs)


def merge_scores(tokens: list[str], merges: list[str]) -> list[float]:
    """The score of each piece, from merges in order of preference, each two pieces and a space.

    **Raises:** `ValueError` if a merge names no two pieces, or makes none.
    """
    _, made = _merges({"merges": merges}, set(tokens))
    return _scores(tokens, made)


def _scores(tokens: list[str], made: Mapping[str, int]) -> list[float]:
    # Single characters are made by no merge, and need no place among those that are.
    return [-float(made.get(token, len(made))) for token in tokens]


def to_json(vocabulary: spm.Vocabulary) -> dict[str, Any]:
    """The file of a vocabulary: for every piece, each pair of pieces that makes it."""
    pieces = Pieces(vocabulary)
    usable = {
        token
        for token, kind in zip(vocabulary.tokens, pieces.types, strict=True)
        if kind in (spm.NORMAL, spm.USER_DEFINED)
    }
    order = sorted(range(len(vocabulary.tokens)), key=lambda index: -vocabulary.scores[index])
    merges = [
        [token[:cut], token[cut:]]
        for token in (vocabulary.tokens[index] for index in order)
        if token in usable
        for cut in range(1, len(token))
        if token[:cut] in usable and token[cut:] in usable
    ]
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": kind == spm.USER_DEFINED,
            "special": kind != spm.USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, pieces.types, strict=True))
        if kind in (spm.CONTROL, spm.UNKNOWN, spm.USER_DEFINED)
    ]
    bos = vocabulary.tokens[pieces.bos]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _SPACES,
        "pre_tokenizer": _SPLIT,
        "post_processor": around_texts({bos: pieces.bos}, {}),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.tokens[pieces.unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
            "merges": merges,
        },
    }


def around_texts(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    """The `post_processor` that puts special tokens, spelling and id, before and after a text."""

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        ends = [[_special(token, kind) for token in tokens] for tokens in (before, after)]
        return [*ends[0], _sequence(name, kind), *ends[1]]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [index], "tokens": [token]}
            for token, index in {**before, **after}.items()
        },
    }


def tokens_around_texts(data: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the `post_processor` of a file puts before and after a text.

    **Raises:** `ValueError` if it does anything else.
    """
    processor = data.get("post_processor")
    if processor is None:
        return (), ()
    try:
        if processor["type"] != "TemplateProcessing":
            raise ValueError(f"Its post_processor is of the type {processor['type']!r:.99}.")
        ids = {name: token["ids"] for name, token in processor["special_tokens"].items()}
        before: list[int] = []
        after: list[int] = []
        around = before
        for part in processor["single"]:
            if "Sequence" in part:
                around = after
            else:
                around += ids[part["SpecialToken"]["id"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("Its post_processor is damaged.") from error
    if not all(type(index) is int for index in before + after):
        raise ValueError("Its post_processor is damaged.")
    return tuple(before), tuple(after)


def _special(token: str, kind: int = 0) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": kind}}


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}


def _check_settings(data: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    expected = {
        "byte-pair merges": model.get("type", "BPE") == "BPE",
        "bytes as fallback": model.get("byte_fallback") is True,
        "no merges left out by chance": not model.get("dropout"),
        "pieces that are written as they are": not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix"),
        "merges for whole words too": not model.get("ignore_merges"),
        "spaces written as ▁ and nothing else normalised": data.get("normalizer")
        in (_SPACES, {"type": "Sequence", "normalizers": [_SPACES]}),
        # Without spaces left, a split at spaces changes nothing.
        "texts taken as a whole": data.get("pre_tokenizer") in (None, _SPLIT),
    }
    if broken := [rule for rule, holds in expected.items() if not holds]:
        raise ValueError(f"It is not that of a Gemma, which would have: {', '.join(broken)}.")


def _added(data: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Id, text and whether it is special, of each token that is matched as it stands."""
    added: dict[int, tuple[str, bool]] = {}
    for token in _list(data, "added_tokens"):
        if not isinstance(token, dict):
            raise ValueError("Its added_tokens are damaged.")
        index, content = token.get("id"), token.get("content")
        if type(index) is not int or not isinstance(content, str) or not content:
            raise ValueError("Its added_tokens are damaged.")
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise ValueError(f"Its token {content!r:.99} has {option}, which is not supported.")
        added[index] = (content, bool(token.get("special")))
    return added


def _tokens(model: Mapping[str, Any], added: Mapping[int, tuple[str, bool]]) -> list[str]:
    """The pieces in the order of their ids."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise ValueError("Its model has no vocab.")
    count = len(set(vocab.values()) | added.keys()) if _are_ids(vocab) else 0
    tokens: list[str | None] = [None] * count
    named = [*vocab.items(), *((content, index) for index, (content, _) in added.items())]
    for token, index in named:
        if not 0 <= index < count:
            raise ValueError("The ids of its vocabulary do not follow one another.")
        # Files of Gemma 1 name the tab twice, by itself and as a byte.
        taken = tokens[index]
        if taken not in (None, token, *_names_of_tab(token)):
            raise ValueError(f"Its pieces {taken!r:.99} and {token!r:.99} share the id {index}.")
        if taken is None or token != "\t":
            tokens[index] = token
    missing = [index for index, token in enumerate(tokens) if token is None]
    if missing or not tokens:
        raise ValueError("The ids of its vocabulary do not follow one another.")
    return [token for token in tokens if token is not None]


def _are_ids(vocab: Mapping[str, Any]) -> bool:
    return all(type(index) is int for index in vocab.values())


def _names_of_tab(token: str) -> tuple[str, ...]:
    return ("\t", "<0x09>") if token in ("\t", "<0x09>") else ()


def _merges(
    model: Mapping[str, Any], known: set[str]
) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The merges, and the place of each piece in the order in which they make them."""
    pairs: list[tuple[str, str]] = []
    made: dict[str, int] = {}
    last = ""
    # Half a million turns: as little as possible is done in each.
    for merge in _list(model, "merges"):
        # A list of two, or in older files both with a space between them.
        parts = merge.split(" ") if type(merge) is str else merge
        if type(parts) is not list or len(parts) != 2 or not known.issuperset(_texts(parts)):
            raise ValueError(f"Its merges do not name two pieces each: {merge!r:.99}.")
        left, right = parts
        piece = left + right
        if piece != last:
            if piece in made or piece not in known:
                raise ValueError(
                    f"Its merges that make {piece!r:.99} do not stand together, or make no piece."
                )
            made[piece] = len(made)
            last = piece
        pairs.append((left, right))
    return pairs, made


def _texts(parts: list[Any]) -> list[str | None]:
    return [part if type(part) is str else None for part in parts]


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    if not isinstance(value, list):
        raise ValueError(f"Its {key} is no list.")
    return value
