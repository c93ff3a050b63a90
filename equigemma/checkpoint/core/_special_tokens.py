"""Special tokens of a Hugging Face folder: the small JSON files beside the vocabulary.

`tokenizer_config.json` (in older folders `special_tokens_map.json` and `added_tokens.json`) names
tokens, `config.json` and `generation_config.json` have their ids.

**Source:** transformers `tokenization_utils_base.py::_from_pretrained`,
`generation/configuration_utils.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._json import read_json
from equigemma.tokenizers import _sentencepiece_model as spm


_NAMES = ("bos", "eos", "pad", "unk")
_SETTINGS, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in a text before anything else is done to it."""

    index: int
    content: str
    special: bool


@dataclass(frozen=True)
class SpecialFiles:
    """What a folder says about its special tokens."""

    names: Mapping[str, str]
    """Spellings of `bos`, `eos`, `pad` and `unk`."""
    variables: Mapping[str, str | None]
    """Spellings that chat templates are given besides; None: there is none."""
    ids: Mapping[str, int]
    """Ids of the same."""
    added: tuple[AddedToken, ...]
    """In the order of their ids."""
    stop: tuple[int, ...]
    """Ids that end a generation."""


def read_special(folder: Path) -> SpecialFiles:
    """What the files of a folder say; all of them may be missing.

    **Raises:** `CheckpointError` if one of them is damaged.
    """
    settings = _json(folder / _SETTINGS)
    if "added_tokens_decoder" in settings:
        added = tuple(_decoder(settings["added_tokens_decoder"]))
    else:
        # As in transformers, these count only where the newer entry is missing.
        settings |= _json(folder / _MAP)
        added = tuple(_encoder(_json(folder / _ADDED), settings))
    config = _json(folder / "config.json")
    text = config.get("text_config")
    sources = [_json(folder / "generation_config.json"), config]
    sources += [text] if isinstance(text, dict) else []
    found = {
        name: [i for data in sources for i in _ids(data, f"{name}_token_id")] for name in _NAMES
    }
    return SpecialFiles(
        names={name: spelled for name in _NAMES if (spelled := _spelled(settings, name))},
        variables=_variables(settings),
        ids={name: ids[0] for name, ids in found.items() if ids},
        added=tuple(sorted(added, key=lambda token: token.index)),
        stop=tuple(dict.fromkeys(found["eos"])),
    )


def with_special(vocabulary: spm.Vocabulary, files: SpecialFiles) -> spm.Vocabulary:
    """The vocabulary with the ids that the files state.

    A spelling counts more than an id, and Gemma's own spelling more than an id too: some configs
    have the ids of another model.

    **Raises:** `CheckpointError` if a token is named that the vocabulary does not have.
    """
    place = {token: index for index, token in enumerate(vocabulary.tokens)}
    ids = dict(vocabulary.ids)
    for name in _NAMES:
        spelled = files.names.get(name)
        if spelled in place:
            ids[name] = place[spelled]
        elif spelled is not None and name in ("bos", "eos"):
            raise CheckpointError(
                f"{_SETTINGS} says that {name}_token is {spelled!r:.99}, which the vocabulary does "
                "not have."
            )
        elif name not in ids and f"<{name}>" not in place and name in files.ids:
            ids[name] = files.ids[name]
    # The tokenizer of Gemma has a mask whether a file says so or not.
    mask = {"mask": "<mask>"} if "<mask>" in place else {}
    stop = (*vocabulary.stop, *files.stop)
    return vocabulary._replace(ids=ids, stop=stop, names=mask | dict(files.variables))


def add_tokens(vocabulary: spm.Vocabulary, added: tuple[AddedToken, ...]) -> spm.Vocabulary:
    """The vocabulary of a `tokenizer.model` with the tokens that the other files add to it.

    **Raises:** `CheckpointError` if their ids contradict those of the vocabulary.
    """
    tokens, scores = list(vocabulary.tokens), list(vocabulary.scores)
    types = list(vocabulary.types)
    place = {token: index for index, token in enumerate(tokens)}
    for token in added:
        kind = spm.CONTROL if token.special else spm.USER_DEFINED
        # Texts have their spaces written as ▁ when they are cut, but not before.
        piece = token.content if token.special else token.content.replace(" ", "▁")
        if token.index == len(tokens) and piece not in place:
            tokens.append(piece)
            scores.append(0.0)
            types.append(kind)
            place[piece] = token.index
        elif place.get(piece) == token.index:
            if types[token.index] in (spm.NORMAL, spm.USER_DEFINED):
                types[token.index] = kind
        elif not _is_byte(tokens, token):
            raise CheckpointError(
                f"{_SETTINGS} or {_ADDED} gives the token {token.content!r:.99} the id "
                f"{token.index}, and in tokenizer.model that id belongs to another or is not the "
                f"next after {len(tokens) - 1}."
            )
    return vocabulary._replace(tokens=tokens, scores=scores, types=types)


def _is_byte(tokens: list[str], token: AddedToken) -> bool:
    """Whether the piece of this id stands for the same byte: files of Gemma 1 name the tab so."""
    data = token.content.encode(errors="replace")
    is_known = token.index < len(tokens) and len(data) == 1
    return is_known and tokens[token.index] == f"<0x{data[0]:02X}>"


def _decoder(data: Any) -> Iterator[AddedToken]:
    """`added_tokens_decoder`: tokens by their ids."""
    if not isinstance(data, dict):
        raise CheckpointError(f"its {_SETTINGS} is damaged: added_tokens_decoder is no object.")
    for index, token in data.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not index.isdecimal() or not isinstance(content, str) or not content:
            raise CheckpointError(
                f"its {_SETTINGS} is damaged: added_tokens_decoder[{index!r:.9}]."
            )
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise CheckpointError(
                    f"its {_SETTINGS}: the token {content!r:.99} has {option}, which is not "
                    "supported."
                )
        yield AddedToken(int(index), content, bool(token.get("special")))


def _encoder(data: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[AddedToken]:
    """`added_tokens.json`: ids by spelling. Those are special that another entry says are."""
    special = {_spelled(settings, name) for name in (*_NAMES, "mask", "sep", "cls")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key)
        special |= {_content(token) for token in more} if isinstance(more, list) else set()
    for content, index in data.items():
        if type(index) is not int or index < 0 or not content:
            raise CheckpointError(f"its {_ADDED} is damaged: {content!r:.99} has no id.")
        yield AddedToken(index, content, content in special)


def _variables(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """The entries that name a token, but for those of `_NAMES` that do."""
    extra = settings.get("extra_special_tokens")
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    variables = {
        key.removesuffix("_token"): _content(value)
        for key, value in named.items()
        if value is None or _content(value) is not None
    }
    return {k: v for k, v in variables.items() if v is None or k not in _NAMES}


def _spelled(settings: Mapping[str, Any], name: str) -> str | None:
    return _content(settings.get(f"{name}_token"))


def _content(token: Any) -> str | None:
    """A token's spelling, which may be written as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _ids(data: Mapping[str, Any], key: str) -> list[int]:
    """An id, or a list of ids; none for null."""
    value = data.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(index) is int for index in ids):
        raise CheckpointError(f"{key} must be an id or a list of ids, got {value!r:.99}.")
    # Other programs write -1 for a token that a model does not have.
    return [index for index in ids if index >= 0]


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
