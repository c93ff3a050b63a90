"""The tokenizer of a folder in the layout of Hugging Face: found, and written.

`transformers` prefers `tokenizer.json`, and so does this; `tokenizer.model` is SentencePiece's.
"""

import shutil
from pathlib import Path

from equigemma import _sentencepiece as spm
from equigemma._huggingface_tokenizer import HuggingFaceTokenizer
from equigemma._tokenizer_json import to_json
from equigemma.checkpoint._errors import CheckpointError
from equigemma.checkpoint._extras import Extras
from equigemma.checkpoint._json import write_json
from equigemma.tokenizer import SentencePieceTokenizer, Tokenizer


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
    try:
        if (folder / _JSON).is_file():
            return HuggingFaceTokenizer.from_file(folder / _JSON)
        if (folder / _MODEL).is_file():
            return SentencePieceTokenizer.from_file(folder / _MODEL)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return None


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
