"""Settings of text embedding models, from the files of `sentence-transformers`.

**Source:** sentence-transformers `base/modules/transformer.py::Transformer.__init__`,
`base/model.py::_parse_model_config`; transformers `tokenization_utils_tokenizers.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._fields import Fields, short
from equigemma.checkpoint.core._json import read_json, write_json
from equigemma.checkpoint.core._tokenizer_files import VocabularyTokenizer
from equigemma.embedding import EmbedderSettings
from equigemma.tokenizers import SpecialTokens
from equigemma.tokenizers._tokenizer_json import around_texts, tokens_around_texts


SETTINGS, TEXTS = "config_sentence_transformers.json", "sentence_bert_config.json"
_JSON, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# What a transformer of another kind would do to its input or its output.
_USUAL = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
_WITHOUT_EFFECT = frozenset(["unpad_inputs"])
# Lengths of queries and documents count only where a caller says which of them a text is.
_UNSET = ("processing_kwargs", "query_length", "document_length", "query_expansion")


def read_settings(folder: Path, special: SpecialTokens) -> EmbedderSettings:
    """What a folder says.

    **Raises:** `CheckpointError` if that makes no sense, or is not supported.
    """
    data = _json(folder / TEXTS)
    read = Fields(data, name=f"{TEXTS}: ")
    longest = read.size_or_none("max_seq_length")
    lower = read.take("do_lower_case", False)
    if not isinstance(lower, bool):
        raise CheckpointError(f"its {TEXTS}: do_lower_case is {short(lower)}, not true or false.")
    for key, value in _USUAL.items():
        if data.get(key, value) != value:
            raise CheckpointError(
                f"its {TEXTS}: {key} is {short(data[key])}; only {value} is read."
            )
        read.take(key)
    for key in _UNSET:
        if read.take(key) not in (None, {}):
            raise CheckpointError(f"its {TEXTS} has {key}, which is not supported.")
    read.refuse_rest(_WITHOUT_EFFECT)
    said = _json(folder / SETTINGS)
    kind = said.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise CheckpointError(f"its {SETTINGS}: model_type is {short(kind)}.")
    prompts, default = _prompts(said)
    fewer = Fields(said, name=f"{SETTINGS}: ").size_or_none("truncate_dim")
    prefix, suffix = _around(folder, special)
    try:
        return EmbedderSettings(
            prefix=prefix,
            suffix=suffix,
            max_length=_longest(folder) if longest is None else longest,
            do_lower_case=lower,
            prompts=prompts,
            default_prompt_name=default,
            truncate_dim=fewer,
        )
    except ValueError as error:
        raise CheckpointError(f"its {TEXTS} or {SETTINGS} makes no sense: {error}") from error


def write_settings(
    settings: EmbedderSettings, folder: Path, tokenizer: VocabularyTokenizer
) -> None:
    """Writes it beside a model, and changes the files of the tokenizer, which are there, so that
    other programs put the same tokens around a text."""
    write_json(
        folder / TEXTS,
        {
            "max_seq_length": settings.max_length,
            "do_lower_case": settings.do_lower_case,
        },
    )
    # What else its origin says, such as how vectors are compared, stays.
    said = {} if tokenizer.origin is None else _json(tokenizer.origin / SETTINGS)
    said.pop("truncate_dim", None)
    write_json(
        folder / SETTINGS,
        {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
        | said
        | {
            "prompts": dict(settings.prompts),
            "default_prompt_name": settings.default_prompt_name,
        }
        | ({} if settings.truncate_dim is None else {"truncate_dim": settings.truncate_dim}),
    )
    special, tokens = tokenizer.special, tokenizer.vocabulary.tokens
    sides = settings.prefix, settings.suffix
    ends = {
        "add_bos_token": sides[0] == (special.bos,),
        "add_eos_token": sides[1] == (special.eos,),
    }
    config = read_json(folder / _CONFIG)
    if any(config.get(key) is not value for key, value in ends.items()):
        write_json(folder / _CONFIG, config | ends)
    data = read_json(folder / _JSON)
    if tokens_around_texts(data) != sides:
        before, after = ({tokens[index]: index for index in side} for side in sides)
        data["post_processor"] = around_texts(before, after)
        write_json(folder / _JSON, data, indent=None)


def _prompts(data: Mapping[str, Any]) -> tuple[tuple[tuple[str, str], ...], str | None]:
    """Prompts by name, and the name of the default."""
    prompts, default = data.get("prompts") or {}, data.get("default_prompt_name")
    is_table = isinstance(prompts, dict) and all(isinstance(p, str) for p in prompts.values())
    if not is_table or not isinstance(default, str | None):
        raise CheckpointError(
            f"its {SETTINGS} is damaged: prompts and default_prompt_name must be texts."
        )
    return tuple(prompts.items()), default


def _longest(folder: Path) -> int | None:
    """The length of a text where nothing states it for embeddings."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    sizes = [
        _json(folder / _CONFIG).get("model_max_length"),
        (text if isinstance(text, dict) else config).get("max_position_embeddings"),
    ]
    # Without a limit transformers writes 10^30, at times as a float.
    given = [int(size) for size in sizes if type(size) in (int, float) and 0 < size < 2**31]
    return min(given, default=None)


def _around(folder: Path, special: SpecialTokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after every text.

    With a `tokenizer.json`, that alone decides, as in transformers from release 5 on.
    """
    if (folder / _JSON).is_file():
        try:
            return tokens_around_texts(read_json(folder / _JSON))
        except ValueError as error:
            raise CheckpointError(f"its {_JSON} cannot be used. {error}") from error
    config = _json(folder / _CONFIG)
    if not isinstance(config.get("add_bos_token"), bool):
        raise CheckpointError(
            f"it has no {_JSON}, and its {_CONFIG} does not say add_bos_token: releases of "
            "transformers differ in what they take that for. Set it to true or false there."
        )
    prefix = (special.bos,) if config["add_bos_token"] else ()
    return prefix, (special.eos,) if config.get("add_eos_token") is True else ()


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
