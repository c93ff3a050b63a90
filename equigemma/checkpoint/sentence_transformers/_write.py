"""The module files of `sentence-transformers`, written beside a model."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._json import write_json
from equigemma.checkpoint.core._keymap import leaves
from equigemma.checkpoint.core._safetensors import WEIGHTS
from equigemma.checkpoint.core._safetensors_write import write_tensor
from equigemma.checkpoint.core._stored import as_numpy, float_dtype
from equigemma.checkpoint.core._tokenizer_files import VocabularyTokenizer
from equigemma.checkpoint.hf._read import CONFIG
from equigemma.checkpoint.hf._write import may_replace
from equigemma.checkpoint.sentence_transformers._read import IDENTITY, MODULES
from equigemma.checkpoint.sentence_transformers._settings import SETTINGS, TEXTS, write_settings
from equigemma.embedding import Embedder


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
    texts, special = embedder.settings, tokenizer.special
    known = range(tokenizer.vocab_size)
    if unknown := [index for index in (*texts.prefix, *texts.suffix) if index not in known]:
        raise CheckpointError(
            f"around its texts come the ids {unknown}, and the tokenizer has {len(known)} tokens."
        )
    if format != "gguf":
        return
    is_usual = texts.prefix in ((), (special.bos,)) and texts.suffix in ((), (special.eos,))
    if not is_usual or texts.do_lower_case or texts.prompt(None) or texts.truncate_dim:
        raise CheckpointError(
            "a .gguf has no place for prompts that come by themselves, for lower case or fewer "
            "numbers, or for other tokens around a text than the beginning and the end of a "
            "sequence. A folder has."
        )


def write_modules(
    embedder: Embedder,
    folder: Path,
    *,
    dtype: np.dtype | None,
    tokenizer: VocabularyTokenizer,
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
    write_settings(embedder.settings, folder, tokenizer)


def may_replace_embedder(path: Path) -> bool:
    """Whether `save` writes something of this name, so that it may be replaced."""
    if path.is_dir():
        return bool(_OF_A_MODULE.fullmatch(path.name)) and all(map(may_replace, path.iterdir()))
    return path.name in (MODULES, SETTINGS, TEXTS) or may_replace(path)


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
