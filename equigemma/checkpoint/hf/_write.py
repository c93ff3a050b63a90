"""Models to folders in the layout of Hugging Face, which `transformers` loads.

**Source:** `docs` of safetensors for the index of a model in several files.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equigemma.checkpoint.core._extras import Extras
from equigemma.checkpoint.core._json import write_json
from equigemma.checkpoint.core._keymap import leaf_shapes, leaves, plan
from equigemma.checkpoint.core._layout import without_unused
from equigemma.checkpoint.core._safetensors import INDEX, WEIGHTS
from equigemma.checkpoint.core._safetensors_write import Part, by_item_size, header
from equigemma.checkpoint.core._stored import Progress, as_numpy, float_dtype
from equigemma.checkpoint.core._tokenizer_files import FILES as TOKENIZER_FILES
from equigemma.checkpoint.hf._config_write import write_config
from equigemma.checkpoint.hf._read import CONFIG
from equigemma.checkpoint.hf._rules import Names, names_of, rules
from equigemma.nn import Transformer
from equigemma.tokenizers import SpecialTokens


GENERATION = "generation_config.json"


def write_folder(
    model: Transformer,
    folder: Path,
    *,
    dtype: np.dtype | None,
    shard_bytes: int,
    special: SpecialTokens | None,
    extras: Extras,
    progress: Progress | None,
) -> None:
    """Writes config and weights into an empty folder.

    **Arguments:** `dtype`: of all weights; None keeps that of each. `shard_bytes`: no file gets
    larger, unless a single tensor is.
    """
    model = without_unused(model)
    config = write_config(model.config, extras.context_length)
    weights = dict(leaves(model))
    assignments = plan(leaf_shapes(model), rules(model.config, _names(model)))
    parts = [
        Part(entry, place, key, float_dtype(entry.path, dtype or weights[entry.path].dtype))
        for entry in assignments
        for place, key in enumerate(entry.keys)
    ]
    named = {part.dtype.name for part in parts}
    # Releases before transformers 4.56 know the second name only.
    config["dtype"] = config["torch_dtype"] = named.pop() if len(named) == 1 else "float32"
    config |= _token_ids(special)
    write_json(folder / CONFIG, config)
    write_json(folder / GENERATION, extras.generation or _token_ids(special))
    _write_weights(folder, _shards(parts, shard_bytes), weights, progress)


def _names(model: Transformer) -> Names:
    """What the published files call the weights of such a model."""
    if model.config.vision is not None:
        return names_of("language_model.model.")
    is_bare = any(layer.attention.mask_kind == "bidirectional" for layer in model.config.layers)
    return names_of("" if is_bare else "model.")


def may_replace(path: Path) -> bool:
    """Whether something in a folder is what `save` writes there, so that it may be replaced."""
    names = (CONFIG, GENERATION, INDEX, *TOKENIZER_FILES)
    return path.is_file() and (path.name in names or path.suffix == ".safetensors")


def _token_ids(special: SpecialTokens | None) -> dict[str, Any]:
    if special is None:
        return {}
    stop = special.stop
    return {
        "bos_token_id": special.bos,
        "eos_token_id": stop[0] if len(stop) == 1 else list(stop),
        "pad_token_id": special.pad,
    }


def _shards(parts: list[Part], limit: int) -> list[list[Part]]:
    """The parts in their order, cut so that no more than `limit` bytes come together."""
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.nbytes
    return shards


def _write_weights(
    folder: Path,
    shards: list[list[Part]],
    weights: dict[str, Any],
    progress: Progress | None,
) -> None:
    names = [WEIGHTS]
    total = sum(part.nbytes for shard in shards for part in shard)
    if len(shards) > 1:
        names = [
            f"model-{index:05}-of-{len(shards):05}.safetensors"
            for index in range(1, len(shards) + 1)
        ]
        places = {
            part.key: name for name, shard in zip(names, shards, strict=True) for part in shard
        }
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    done = 0
    for name, shard in zip(names, shards, strict=True):
        with open(folder / name, "wb") as file:
            file.write(header(shard))
            for part, array in _arrays(by_item_size(shard), weights):
                array.view(np.uint8).tofile(file)
                done += part.nbytes
                if progress is not None:
                    progress(done, total, part.entry.path)


def _arrays(parts: list[Part], weights: Mapping[str, Any]) -> Iterator[tuple[Part, np.ndarray]]:
    """Every part with its numbers; a leaf in several parts is read once."""
    path, leaf = "", np.empty(0)
    for part in parts:
        if part.entry.path != path:
            path, leaf = part.entry.path, as_numpy(weights, part.entry.path, part.dtype)
        array = part.entry.part_to_theirs(part.entry.parts(leaf)[part.place])
        yield part, np.ascontiguousarray(array)
