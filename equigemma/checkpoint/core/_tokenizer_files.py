"""The tokenizer of a folder in the layout of Hugging Face: found, and written.

`transformers` prefers `tokenizer.json`, and so does this; `tokenizer.model` is SentencePiece's.
"""

import shutil
from pathlib import Path

from equigemma.checkpoint.core._errors import CheckpointError, about
from equigemma.checkpoint.core._extras import Extras
from equigemma.checkpoint.core._json import write_json
from equigemma.checkpoint.core._special_tokens import (
    AddedToken,
    add_tokens,
    read_special,
    with_special,
)
from equigemma.tokenizers import SentencePieceTokenizer, Tokenizer
from equigemma.tokenizers import _sentencepiece_model as spm
from equigemma.tokenizers._huggingface import HuggingFaceTokenizer, read_merges
from equigemma.tokenizers._tokenizer_json import to_json


VocabularyTokenizer = HuggingFaceTokenizer | SentencePieceTokenizer
"""The tokenizers whose vocabulary can be written."""

_JSON, _MODEL, _CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
FILES = (
    _JSON,
    _MODEL,
    _CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether `read_tokenizer` finds one."""
    return (folder / _JSON).is_file() or (folder / _MODEL).is_file()


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, if it has one.

    **Raises:** `CheckpointError` if its file is damaged or not that of a Gemma; `ImportError` if
    the package that reads it is not installed.
    """
    if not has_tokenizer(folder):
        return None
    with about(folder):
        files = read_special(folder)
    path = folder / (_JSON if (folder / _JSON).is_file() else _MODEL)
    try:
        if path.name == _JSON:
            merges = read_merges(path)
            vocabulary = with_special(_with_newer(merges.vocabulary, files.added), files)
            return HuggingFaceTokenizer(merges._replace(vocabulary=vocabulary), origin=folder)
        vocabulary = add_tokens(spm.from_model(path.read_bytes()), files.added)
        return SentencePieceTokenizer(with_special(vocabulary, files), origin=folder)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a tokenizer that can be used. {error}") from error


def _with_newer(vocabulary: spm.Vocabulary, added: tuple[AddedToken, ...]) -> spm.Vocabulary:
    """The vocabulary of a `tokenizer.json`, which lists its tokens, with those added since then."""
    known = set(vocabulary.tokens)
    return add_tokens(
        vocabulary,
        tuple(t for t in added if t.index >= len(vocabulary.tokens) and t.content not in known),
    )


def write_tokenizer(tokenizer: VocabularyTokenizer, folder: Path, extras: Extras) -> None:
    """Writes the files of a tokenizer.

    Those of the folder that it came from are taken as they are; what is missing is made from its
    vocabulary.
    """
    if tokenizer.origin is not None and tokenizer.origin.is_dir():
        for name in FILES:
            if (tokenizer.origin / name).is_file():
                shutil.copyfile(tokenizer.origin / name, folder / name)
    vocabulary, special = tokenizer.vocabulary, tokenizer.special
    assert special.unknown is not None
    named = {"bos": special.bos, "eos": special.eos, "pad": special.pad, "unk": special.unknown}
    if not (folder / _JSON).exists():
        write_json(folder / _JSON, to_json(vocabulary), indent=None)
    if not (folder / _MODEL).exists():
        model = spm.to_model(
            vocabulary, unknown=special.unknown, bos=special.bos, eos=special.eos, pad=special.pad
        )
        (folder / _MODEL).write_bytes(model)
    if not (folder / _CONFIG).exists():
        config = {
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        config |= {f"{name}_token": vocabulary.tokens[index] for name, index in named.items()}
        if extras.chat_template is not None:
            config["chat_template"] = extras.chat_template
        write_json(folder / _CONFIG, config)
