"""What makes a folder with a model one of `sentence-transformers`: a list of modules and them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from equigemma._tokenizer_json import around_texts
from equigemma.checkpoint._embedder import IDENTITY, MODULES
from equigemma.checkpoint._errors import CheckpointError
from equigemma.checkpoint._extras import Extras
from equigemma.checkpoint._hf import CONFIG
from equigemma.checkpoint._hf_tensors import WEIGHTS
from equigemma.checkpoint._hf_tokenizer import VocabularyTokenizer
from equigemma.checkpoint._hf_write import may_replace, write_tensor
from equigemma.checkpoint._json import read_json, write_json
from equigemma.checkpoint._keymap import leaves
from equigemma.checkpoint._stored import as_numpy, float_dtype
from equigemma.embedding import Embedder


_SETTINGS, _TEXTS = "config_sentence_transformers.json", "sentence_bert_config.json"
_OF_A_MODULE = re.compile(r"[0-9]+_(Pooling|Dense|Normalize)")


def check_embedder(embedder: Embedder, format: str, tokenizer: VocabularyTokenizer | None) -> None:
    """Refuses what a folder or file cannot say.

    **Raises:** `CheckpointError`.
    """
    if format not in ("huggingface", "gguf"):
        raise CheckpointError(
            "a model that makes vectors is written as a folder for sentence-transformers or as a "
            f".gguf; {format} has no place for all of it. The model is `embedder.model`."
        )
    if tokenizer is None:
        raise CheckpointError(
            "a model that makes vectors needs its tokenizer: pass what load gave."
        )
    if embedder.suffix not in ((), (tokenizer.special.eos,)):
        raise CheckpointError(
            f"its texts end with the ids {embedder.suffix}; only the end of a sequence, "
            f"{tokenizer.special.eos}, or nothing can be written."
        )


def write_modules(
    embedder: Embedder,
    folder: Path,
    *,
    dtype: np.dtype | None,
    tokenizer: VocabularyTokenizer,
    extras: Extras,
) -> None:
    """Writes all but the model and the files of the tokenizer, of which it changes one."""
    count = len(embedder.dense)
    kinds = ["Transformer", "Pooling", *["Dense"] * count, "Normalize"]
    names = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": name,
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (kind, name) in enumerate(zip(kinds, names, strict=True))
    ]
    (folder / MODULES).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    width = embedder.model.config.width
    _write_config(folder / names[1], _pooling(width))
    weights: dict[str, Any] = dict(leaves(embedder.dense))
    for index, name in enumerate(names[2:-1]):
        leaf = weights[f"{index}.weight"]
        kept = float_dtype(f"dense.{index}.weight", dtype or leaf.dtype)
        weight = as_numpy(weights, f"{index}.weight", kept).T
        _write_config(folder / name, _linear(*weight.shape))
        write_tensor(folder / name / WEIGHTS, "linear.weight", np.ascontiguousarray(weight))
    (folder / names[-1]).mkdir()
    write_json(
        folder / _TEXTS,
        {"max_seq_length": extras.context_length or 2048, "do_lower_case": False},
    )
    _write_settings(folder / _SETTINGS, tokenizer.origin)
    _let_texts_end(folder, tokenizer, bool(embedder.suffix))


def may_replace_embedder(path: Path) -> bool:
    """Whether `save` writes something of this name, so that it may be replaced."""
    if path.is_dir():
        return bool(_OF_A_MODULE.fullmatch(path.name)) and all(map(may_replace, path.iterdir()))
    return path.name in (MODULES, _SETTINGS, _TEXTS) or may_replace(path)


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir()
    write_json(folder / CONFIG, config)


def _pooling(width: int) -> dict[str, Any]:
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    modes += ("weightedmean_tokens", "lasttoken")
    chosen = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes}
    return {"word_embedding_dimension": width} | chosen | {"include_prompt": True}


def _linear(outputs: int, inputs: int) -> dict[str, Any]:
    return {
        "in_features": inputs,
        "out_features": outputs,
        "bias": False,
        "activation_function": IDENTITY,
    }


def _write_settings(path: Path, origin: Path | None) -> None:
    """Prompts and the like: those of the folder that the model came from, or none."""
    if origin is not None and (origin / _SETTINGS).is_file():
        shutil.copyfile(origin / _SETTINGS, path)
        return
    write_json(
        path,
        {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def _let_texts_end(folder: Path, tokenizer: VocabularyTokenizer, ends: bool) -> None:
    """Has others put the end of a sequence after every text, or not, as it is put here."""
    config = read_json(folder / "tokenizer_config.json")
    if config.get("add_eos_token", True) is not ends:
        write_json(folder / "tokenizer_config.json", config | {"add_eos_token": ends})
    special, tokens = tokenizer.special, tokenizer.vocabulary.tokens
    bos, eos = tokens[special.bos], tokens[special.eos]
    # Where this file says it, it counts more than the other.
    data = read_json(folder / "tokenizer.json")
    if (eos in json.dumps(data.get("post_processor"))) is not ends:
        after = {eos: special.eos} if ends else {}
        data["post_processor"] = around_texts({bos: special.bos}, after)
        write_json(folder / "tokenizer.json", data, indent=None)
