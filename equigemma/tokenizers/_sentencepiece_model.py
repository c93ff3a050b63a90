"""SentencePiece's model file: a vocabulary to bytes, and bytes to a vocabulary.

The format is a protocol-buffer message of three parts. It is written and read here field by field:
the message classes that `sentencepiece` ships demand the newest release of the `protobuf` package,
which many environments pin to an older one. Nothing here turns text into tokens; the library does.

**Source:** sentencepiece `src/sentencepiece_model.proto`; the encoding of protocol buffers.
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BPE = 3, 2
_WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 24, 35
_RULES, _DUMMY_PREFIX, _TRIM_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}


class Vocabulary(NamedTuple):
    """Pieces in the order of their ids. `types` are the constants of this file, as in GGUF too."""

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    ids: Mapping[str, int] = MappingProxyType({})
    """Ids of `bos`, `eos`, `pad` and `unk` that a file states; others are found by spelling."""
    stop: tuple[int, ...] = ()
    """Further ids that a file states as the end of a generation."""
    names: Mapping[str, str | None] = MappingProxyType({})
    """Spellings of special tokens that a file names for chat templates, besides those of `ids`;
    None: it says that there is none."""
    chat_bos: bool = False
    """Whether the file says that `bos` comes before every text, conversations among them."""


def to_model(vocabulary: Vocabulary, *, unknown: int, bos: int, eos: int, pad: int) -> bytes:
    """The model file of a Gemma tokenizer with these pieces.

    Byte-pair merges, bytes as fallback, and text taken as it is: no normalisation, no space added
    in front, none removed.

    **Raises:** `ValueError` if a score is not a number, or a type not a constant of this file.
    """
    known = all(NORMAL <= kind <= BYTE for kind in vocabulary.types)
    if not known or not all(map(math.isfinite, vocabulary.scores)):
        raise ValueError("The scores or types of this vocabulary make no sense.")
    special = {"unk": unknown, "bos": bos, "eos": eos, "pad": pad}
    trainer = [
        _integer(_MODEL_TYPE, _BPE),
        _integer(4, len(vocabulary.tokens)),
        _integer(_BYTE_FALLBACK, 1),
        *(_integer(_IDS[name], index) for name, index in special.items()),
        *(
            # Their spelling has a field of its own, five behind that of the id.
            _message(_IDS[name] + 5, vocabulary.tokens[index].encode())
            for name, index in special.items()
        ),
    ]
    normalizer = [
        _message(1, b"identity"),
        _integer(_DUMMY_PREFIX, 0),
        _integer(_TRIM_SPACES, 0),
        _integer(_ESCAPE_SPACES, 1),
    ]
    scores = struct.pack(f"<{len(vocabulary.scores)}f", *vocabulary.scores)
    parts = [
        _piece(token, scores[4 * index : 4 * index + 4], kind)
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
    ]
    parts.append(_message(_TRAINER, b"".join(trainer)))
    parts.append(_message(_NORMALIZER, b"".join(normalizer)))
    return b"".join(parts)


def from_model(data: bytes) -> Vocabulary:
    """The pieces of a model file whose settings are those of Gemma.

    **Raises:** `ValueError` if the bytes are no such file, or if it does something to a text that
    no Gemma tokenizer does.
    """
    tokens, scores, types = [], [], []
    settings = {}
    try:
        for part, message in _fields(data):
            if part == _PIECES:
                piece = dict(_fields(message))
                tokens.append(piece[_PIECE].decode())
                scores.append(struct.unpack("<f", piece.get(_SCORE, bytes(4)))[0])
                types.append(piece.get(_TYPE, NORMAL))
            elif part in (_TRAINER, _NORMALIZER):
                settings |= {(part, field): value for field, value in _fields(message)}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ValueError("This is not a SentencePiece model: its bytes make no sense.") from error
    expected = {
        "byte-pair merges": settings.get((_TRAINER, _MODEL_TYPE)) == _BPE,
        "bytes as fallback": settings.get((_TRAINER, _BYTE_FALLBACK), 0) == 1,
        "spaces in front of words": settings.get((_TRAINER, _WHITESPACE_AS_SUFFIX), 0) == 0,
        "no normalisation": not settings.get((_NORMALIZER, _RULES)),
        "no space added in front": settings.get((_NORMALIZER, _DUMMY_PREFIX), 1) == 0,
        "no space removed": settings.get((_NORMALIZER, _TRIM_SPACES), 1) == 0,
        "spaces written as ▁": settings.get((_NORMALIZER, _ESCAPE_SPACES), 1) == 1,
    }
    broken = [rule for rule, holds in expected.items() if not holds]
    if broken or not tokens:
        raise ValueError(
            "This is not the SentencePiece model of a Gemma, which would have: "
            f"{', '.join(broken) or 'at least one piece'}."
        )
    stated = {name: settings.get((_TRAINER, field)) for name, field in _IDS.items()}
    ids = {
        # A missing token has the id -1, which is a number of 64 bits here.
        name: index
        for name, index in stated.items()
        if isinstance(index, int) and index < len(tokens)
    }
    return Vocabulary(tokens, scores, types, ids)


def _piece(token: str, score: bytes, kind: int) -> bytes:
    name = token.encode()
    size = len(name)
    if size < 100:
        # All lengths fit one byte. This line runs for each of a quarter of a million pieces.
        return b"\x0a%c\x0a%c%b\x15%b\x18%c" % (size + 9, size, name, score, kind)
    body = _message(_PIECE, name) + b"\x15" + score + _integer(_TYPE, kind)
    return _message(_PIECES, body)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits per byte, lowest first; the eighth bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: whole numbers decoded, the rest as bytes."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        if tag & 7 == 0:
            value, at = _read_varint(data, at)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            size, at = _read_varint(data, at)
        else:
            size = {1: 8, 5: 4}[tag & 7]
        if at + size > len(data):
            raise ValueError("a field ends behind its message")
        yield tag >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
